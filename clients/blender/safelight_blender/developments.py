"""The running generations of this Blender, each with its image. Use it from the main thread only.

`tick` copies what has come into the images; a Blender timer calls it while a generation runs. An image is found by a
custom property each time, because undo and opening a file replace all datablocks.
"""

from __future__ import annotations

import concurrent.futures
import random
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import bpy

from . import pixels
from .receiver import Failure, Generation, Receiver, Server, failure_of

if TYPE_CHECKING:
    import safelight

TICK_S = 1 / 30
ID = "safelight_id"
"""The custom property by which the image of a generation is found."""
NAME_LENGTH = 40
FIRST_SIZE_PX = 256
"""Size of a new image in pixels, until the server has accepted the generation and its size is known."""
AREAS = ("IMAGE_EDITOR", "NODE_EDITOR", "VIEW_3D")
"""Types of Blender's areas that have the panel or show images."""


@dataclass(slots=True)
class Development:
    """A generation and the image that shows it.

    Attributes:
        image_id: the value of the image's property `ID`.
        title: the name that the panel shows.
        num_images: number of previews and pictures that were copied into the image.
    """

    generation: Generation
    image_id: str
    title: str
    num_images: int = 0


@dataclass(slots=True)
class State:
    """State of the add-on while it is registered; `receiver` is None before its first use.

    Attributes:
        running: the running generations, in the order in which they were started.
        models: ids of the server's models, as far as they were requested.
        listing: the pending request for them.
        failure: the latest failure, which the panel shows.
        told: what the panel showed last, to detect changes.
    """

    receiver: Receiver | None = None
    running: list[Development] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    listing: concurrent.futures.Future[list[str]] | None = None
    failure: Failure | None = None
    told: list[tuple[str, int]] = field(default_factory=list)


state = State()


def start(server: Server, prompt: str, options: safelight.GenerateOptions) -> tuple[Development, bpy.types.Image]:
    """Starts a generation and makes its image.

    Args:
        options: without a seed, this function chooses one. Blender's integers have 32 bits, so a seed of 64 bits that
            the server chooses could not be entered again.
    """
    options.setdefault("seed", random.getrandbits(31))
    width, height = options.get("width") or FIRST_SIZE_PX, options.get("height") or FIRST_SIZE_PX
    image = bpy.data.images.new(prompt[:NAME_LENGTH], width, height, alpha=True)
    image.colorspace_settings.name = "sRGB"
    image.use_fake_user = True  # otherwise it would not be saved while nothing uses it
    image[ID] = uuid.uuid4().hex
    image["safelight_prompt"] = prompt
    for name in ("negative_prompt", "model", "seed", "steps", "guidance_scale", "strength"):
        if (value := options.get(name)) is not None:
            image[f"safelight_{name}"] = value
    generation = _receiver().generate(server, prompt, options)
    development = Development(generation, image[ID], image.name)
    state.running.append(development)
    state.failure = None
    _keep_ticking()
    return development, image


def list_models(server: Server) -> None:
    """Requests the list of the server's models; `tick` takes the answer."""
    state.listing, state.failure = _receiver().models(server), None
    _keep_ticking()


def cancel() -> None:
    """Cancels all running generations at the server. Returns at once; they end at later ticks."""
    for development in state.running:
        _receiver().cancel(development.generation)


def find_image(development: Development) -> bpy.types.Image | None:
    """The image of a generation; None if it was deleted or undone, or if another file was opened."""
    return next((image for image in bpy.data.images if image.get(ID) == development.image_id), None)


def tick() -> float | None:
    """Handles what has come. Returns the seconds until the next call; None if nothing more can come."""
    for development in list(state.running):
        _advance(development)
    if state.listing is not None and state.listing.done():
        listing, state.listing = state.listing, None
        error = listing.exception()
        if isinstance(error, Exception):
            state.failure = failure_of(error)
        else:
            state.models = listing.result()
    _tell()
    return TICK_S if state.running or state.listing else None


def wait(development: Development) -> None:
    """Blocks until a generation has ended, for scripts. Its previews are shown meanwhile."""
    while development in state.running:
        development.generation.ended.wait(TICK_S)
        tick()


def close() -> None:
    """Cancels everything at the server and ends the thread."""
    if bpy.app.timers.is_registered(tick):
        bpy.app.timers.unregister(tick)
    if state.receiver is not None:
        state.receiver.close()
        for development in list(state.running):
            if development.generation.ended.is_set():
                _advance(development)
    state.receiver, state.listing, state.running = None, None, []


def _receiver() -> Receiver:
    if state.receiver is None:
        state.receiver = Receiver()
    return state.receiver


def _keep_ticking() -> None:
    if not bpy.app.timers.is_registered(tick):
        bpy.app.timers.register(tick, persistent=True)  # persistent: it keeps running when another file is opened


def _advance(development: Development) -> None:
    """Shows what has come of one generation, and finishes its image if it has ended."""
    generation = development.generation
    ended = generation.ended.is_set()  # read first, so that the image of an ended one is the picture
    image = find_image(development)
    if image is None and not ended:
        _receiver().cancel(generation)
    elif image is not None and (shown := generation.take()) is not None:
        pixels.show(image, shown, generation.width_px, generation.height_px)
        development.num_images += 1
    elif image is not None and generation.name and not development.num_images:
        pixels.resize(image, generation.width_px, generation.height_px)
    if not ended:
        return
    state.running.remove(development)
    if generation.failure is not None and image is not None:
        state.failure = generation.failure
    if image is not None:
        _finish(image, development)


def _finish(image: bpy.types.Image, development: Development) -> None:
    """Packs the image into the file, or deletes it if it shows nothing."""
    generation = development.generation
    if generation.failure is not None and not development.num_images:
        bpy.data.images.remove(image)
        return
    del image[ID]
    image["safelight_generation"] = generation.name
    if generation.failure is not None:
        image["safelight_unfinished"] = f"{generation.failure.reason} after step {generation.step}"
    image.pack()


def _tell() -> None:
    """Updates the panel's rows, and redraws areas if something has changed."""
    told = [(_title(development), development.num_images) for development in state.running]
    if told == state.told and told:
        return
    state.told = told
    manager = bpy.context.window_manager
    manager.safelight_rows.clear()
    for development, (title, _) in zip(state.running, told, strict=True):
        row = manager.safelight_rows.add()
        row.title = title
        row.percent = 100 * development.generation.step / max(development.generation.num_steps, 1)
    for window in manager.windows:
        for area in window.screen.areas:
            if area.type in AREAS:
                area.tag_redraw()


def _title(development: Development) -> str:
    generation = development.generation
    if generation.num_steps:
        return f"{development.title}: step {generation.step} of {generation.num_steps}"
    return f"{development.title}: {'waits' if generation.name else 'asks'}"
