"""Functions that the tests run inside Blender, with its own Python.

Command-line arguments: the name of a function, the file for its result, and the function's arguments.
"""

import json
import sys
import threading
from pathlib import Path

import addon_utils
import bpy
import numpy as np

ADDON = "safelight_blender"
PROMPT = "a red potion"


def install(zip_file):
    """Installs and enables the add-on, as Preferences > Add-ons > Install does."""
    bpy.ops.preferences.addon_install(filepath=zip_file, overwrite=True)
    bpy.ops.preferences.addon_enable(module=ADDON)
    bpy.context.preferences.view.show_splash = False
    bpy.ops.wm.save_userpref()
    return {"enabled": addon_utils.check(ADDON)[1]}


def use(address, key="", ca_file=""):
    preferences = bpy.context.preferences.addons[ADDON].preferences
    preferences.server, preferences.api_key = address, key
    preferences.tls, preferences.ca_file, preferences.server_name = bool(ca_file), ca_file, "safelight.example"


def newest():
    return bpy.context.scene.safelight.image


def pixels(image):
    """The pixels of an image: (height, width, 4) float32, the lowest row first."""
    values = np.empty(len(image.pixels), np.float32)
    image.pixels.foreach_get(values)
    return values.reshape(image.size[1], image.size[0], 4)


def described(image, file):
    """Describes an image and writes its pixels to a file."""
    np.save(file, pixels(image))
    return {
        "name": image.name,
        "packed": image.packed_file is not None,
        "colorspace": image.colorspace_settings.name,
        "fake_user": image.use_fake_user,
        "properties": {key: image[key] for key in image.keys() if key.startswith("safelight_")},  # noqa: SIM118  # no dict
    }


def tick_until(condition):
    """Calls `tick` as Blender's timer would, which does not run without a screen."""
    from safelight_blender import developments

    while not condition():
        if developments.state.running:
            developments.state.running[0].generation.ended.wait(0.01)
        developments.tick()


def running():
    from safelight_blender import developments

    return developments.state.running


def develop(address, folder):
    """Starts a generation, checks the image after each tick, and saves the file."""
    use(address)
    assert bpy.ops.safelight.develop(prompt=PROMPT, negative_prompt="blue", seed=7, steps=40) == {"FINISHED"}
    image, seen, sizes = newest(), {}, set()

    def ended():
        if running() and running()[0].num_images:
            sizes.add(tuple(image.size))
            seen.setdefault(pixels(image).tobytes(), len(seen))
        return not running()

    tick_until(ended)
    bpy.ops.wm.save_as_mainfile(filepath=f"{folder}/saved.blend")
    return described(image, f"{folder}/developed.npy") | {"seen": len(seen), "sizes": sorted(sizes)}


def reopen(folder):
    """Opens a saved file and describes its image."""
    bpy.ops.wm.open_mainfile(filepath=f"{folder}/saved.blend")
    return described(newest(), f"{folder}/reopened.npy")


def wait(address, folder):
    """Waits for a picture as a script does; then starts from that picture, with the scene's settings."""
    use(address)
    assert bpy.ops.safelight.develop(prompt=PROMPT, seed=3, wait=True) == {"FINISHED"}
    first = described(newest(), f"{folder}/first.npy")
    settings = bpy.context.scene.safelight
    settings.prompt, settings.seed, settings.init_image, settings.strength = "a blue potion", 4, newest(), 0.5
    assert bpy.ops.safelight.develop(wait=True) == {"FINISHED"}
    second = described(newest(), f"{folder}/second.npy")
    assert bpy.ops.safelight.develop(seed=-1, init_image="", wait=True) == {"FINISHED"}
    drawn = newest()["safelight_seed"]
    return {"first": first, "second": second, "drawn": drawn}


def refused(address, key="", ca_file=""):
    """Returns the error of a script, the error of listing models, and the remaining images."""
    use(address, key, ca_file)
    texts = []
    for arguments in ({"prompt": PROMPT}, {"prompt": PROMPT, "steps": 100_000}, {"prompt": ""}):
        try:
            bpy.ops.safelight.develop(**arguments, wait=True)
        except RuntimeError as error:
            texts.append(str(error))
        else:
            texts.append("")
    from safelight_blender import developments

    bpy.ops.safelight.list_models()
    tick_until(lambda: developments.state.listing is None)
    failure = developments.state.failure
    return {
        "texts": texts,
        "images": sum(image.get("safelight_prompt") is not None for image in bpy.data.images),
        "models": developments.state.models,
        "panel": failure.reason if failure else "",
    }


def cancel(address, folder):
    """Cancels generations by the operator, by opening another file, and by disabling the add-on."""
    from safelight_blender import developments

    use(address)
    names = {}

    def start():
        bpy.ops.safelight.develop(prompt=PROMPT, steps=900)
        [development] = running()
        tick_until(lambda: development.num_images > 0)
        return development.generation

    generation = start()
    bpy.ops.safelight.cancel()
    tick_until(lambda: not running())
    names["operator"], reason = generation.name, developments.state.failure.reason
    unfinished = described(newest(), f"{folder}/unfinished.npy")
    generation = start()
    bpy.data.images.remove(newest())
    tick_until(lambda: not running())
    names["removed"] = generation.name
    generation = start()
    bpy.ops.wm.read_homefile(use_empty=True)
    tick_until(lambda: not running())
    names["file"] = generation.name
    use(address)
    generation = start()
    bpy.ops.preferences.addon_disable(module=ADDON)
    names["disabled"] = generation.name
    threads = [thread.name for thread in threading.enumerate()]
    bpy.ops.preferences.addon_enable(module=ADDON)
    use(address)
    generation = start()
    names["enabled again"] = generation.name
    bpy.ops.safelight.cancel()
    tick_until(lambda: not running())
    return {"names": names, "reason": reason, "threads": threads, "unfinished": unfinished}


def window(address, folder, num_steps):
    """In a window: runs generations in two editors at once, and counts the ticks of its own timer meanwhile."""
    from safelight_blender import developments

    use(address)
    window, seen, ticks, developing = bpy.context.window_manager.windows[0], {}, 0, []
    by_size = sorted(window.screen.areas, key=lambda area: area.width * area.height)
    images, [nodes] = by_size[-1], [area for area in by_size if area.type == "DOPESHEET_EDITOR"]
    images.ui_type, nodes.ui_type = "IMAGE_EDITOR", "ShaderNodeTree"
    images.spaces.active.show_region_ui = True
    tree = bpy.context.object.active_material.node_tree
    tree.nodes.active = texture = tree.nodes.new("ShaderNodeTexImage")
    settings = bpy.context.scene.safelight
    settings.prompt, settings.seed, settings.steps = PROMPT, 7, int(num_steps)
    for panel in bpy.types.Panel.__subclasses__():  # so that the add-on's tab is shown
        of_sidebar = getattr(panel, "bl_space_type", "") == "IMAGE_EDITOR" and panel.bl_region_type == "UI"
        if of_sidebar and panel.bl_category != "Safelight" and hasattr(bpy.types, panel.__name__):
            bpy.utils.unregister_class(panel)

    def begin():
        press()
        bpy.app.timers.register(count)

    def press():
        for area, arguments in ((images, {}), (nodes, {"prompt": "a blue potion", "seed": 8})):
            with bpy.context.temp_override(window=window, area=area, region=area.regions[-1]):
                assert bpy.ops.safelight.develop(**arguments) == {"FINISHED"}
            developing.append(newest().name)

    def count():
        nonlocal ticks
        ticks += 1
        if not running() and developing[0] not in bpy.data.images:
            return answer({"failure": str(developments.state.failure)})
        image = bpy.data.images[developing[0]]
        previewed = running() and running()[0].title == image.name and running()[0].num_images > 0
        if previewed and (shown := pixels(image).tobytes()) not in seen:
            seen[shown] = ticks
        if running():
            return 0.01
        if len(seen) < 2:  # on a busy machine it may end before two images were drawn
            settings.seed += 1
            seen.clear()
            developing.clear()
            press()
            return 0.01
        bpy.app.timers.register(finish, first_interval=1)  # so that the last image is drawn before
        return None

    def finish():
        first, second = (bpy.data.images[name] for name in developing)
        described(second, f"{folder}/second.npy")
        result = described(first, f"{folder}/first.npy") | {"ticks": list(seen.values())}
        result["in_editor"], result["in_node"] = images.spaces.active.image.name, texture.image.name
        answer(result)

    bpy.app.timers.register(begin, first_interval=1)


def leave(address):
    """Ends Blender while a generation runs."""
    use(address)
    bpy.ops.safelight.develop(prompt=PROMPT, steps=900)
    [development] = running()
    tick_until(lambda: development.num_images > 0)
    return {"name": development.generation.name}


def answer(result):
    unfinished = Path(f"{ANSWER}.new")
    unfinished.write_text(json.dumps(result))
    unfinished.rename(ANSWER)


NAME, ANSWER, *ARGUMENTS = sys.argv[sys.argv.index("--") + 1 :]
RESULT = globals()[NAME](*ARGUMENTS)
if RESULT is not None:
    answer(RESULT)
