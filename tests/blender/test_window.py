"""The add-on in Blender's window, on a virtual screen with OpenGL in software."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.blender.conftest import BOUND_S, Blender
from tests.blender.test_addon import picture, shown
from tests.clients.case import ROOT
from tests.conftest import Start
from tests.engines.sheet import screen

SIZE = (1280, 800)
SCREENSHOTS = ROOT / "out/blender"
STEPS = 50
"""The most steps that the model allows."""


@pytest.mark.timeout(400)
async def test_the_window_goes_on_while_an_image_develops(blender: Blender, start: Start, tmp_path: Path) -> None:
    geometry = ("--window-geometry", "0", "0", str(SIZE[0]), str(SIZE[1]))
    answer, frames = blender.answer("window"), []
    async with start() as running, screen(tmp_path, SIZE) as display:
        command = blender.command("window", running.address, tmp_path, str(STEPS), background=False)
        command[1:1] = geometry
        environment = {"DISPLAY": display.display, "LIBGL_ALWAYS_SOFTWARE": "1"}
        async with blender.running(*command, **environment) as process, asyncio.timeout(BOUND_S):
            said = asyncio.ensure_future(process.stdout.read())
            while not answer.exists():
                assert process.returncode is None, (await said).decode()[-8000:]
                pixels = await asyncio.to_thread(display.pixels, SIZE)
                if not frames or not np.array_equal(frames[-1], pixels):
                    frames.append(pixels)
                await asyncio.wait([said], timeout=0.1)
            last = display.pixels(SIZE)
        developed = json.loads(answer.read_text())
        assert "failure" not in developed, developed
        first = await picture(running.address, seed=developed["properties"]["safelight_seed"], steps=STEPS)
        second = await picture(running.address, "a blue potion", seed=8, steps=STEPS)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for part, pixels in (("middle", frames[len(frames) // 2]), ("end", last)):
        PIL.Image.fromarray(pixels).save(SCREENSHOTS / f"window-{part}.png")
    assert np.array_equal(shown(tmp_path / "first.npy"), first), "the picture, to the pixel"
    assert np.array_equal(shown(tmp_path / "second.npy"), second)
    assert developed["in_editor"] == developed["name"], "the editor whose button was pressed shows it"
    assert developed["in_node"].startswith("a blue potion"), "the shader editor's active node has the other one"
    first_preview, *_, last_preview = developed["ticks"]
    assert last_preview > first_preview, "Blender's timers ran between previews"
    assert len(frames) > 3, "it is seen on the screen"
