"""Runs a program with a sheet of eight sprites on a virtual screen, watches it, and compares it at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import safelight
from numpy.typing import NDArray

from tests.clients.case import ROOT
from tests.conftest import Start

SPRITE, COLUMNS, ROWS = 128, 4, 2
WIDTH, HEIGHT = SPRITE * COLUMNS, SPRITE * ROWS
SCREENSHOTS = ROOT / "out/engines"
DRAWN_S = 20.0


@dataclass(slots=True)
class Screen:
    """A virtual screen: its X11 display name, and the file with its current pixels, in xwd format."""

    display: str
    framebuffer: Path

    def pixels(self, size: tuple[int, int] = (WIDTH, HEIGHT)) -> NDArray[np.uint8]:
        """The pixels of its top left corner of this (width, height), as (height, width, 3) uint8 RGB."""
        data = self.framebuffer.read_bytes()
        header = struct.unpack(">25I", data[:100])
        header_bytes, stride, num_colors = header[0], header[12], header[19]
        begin = header_bytes + 12 * num_colors
        rows = np.frombuffer(data, np.uint8, header[5] * stride, begin).reshape(header[5], stride)
        width, height = size
        return rows[:height, : 4 * width].reshape(height, width, 4)[:, :, 2::-1]  # from BGRX to RGB


@contextlib.asynccontextmanager
async def screen(folder: Path, size: tuple[int, int] = (640, 480)) -> AsyncIterator[Screen]:
    """Starts Xvfb on a display that is free."""
    read, write = os.pipe()
    command = [
        "Xvfb",
        "-displayfd",
        str(write),
        "-screen",
        "0",
        f"{size[0]}x{size[1]}x24",
        "-fbdir",
        str(folder),
        "-nolisten",
        "tcp",
    ]
    server = await asyncio.create_subprocess_exec(*command, pass_fds=[write], stderr=asyncio.subprocess.DEVNULL)
    os.close(write)
    try:
        with os.fdopen(read) as pipe:
            number = await asyncio.wait_for(asyncio.to_thread(pipe.readline), 30)
        yield Screen(f":{number.strip()}", folder / "Xvfb_screen0")
    finally:
        server.terminate()
        await server.wait()


async def develop(
    start: Start, folder: Path, name: str, prompts: Sequence[str], *command: str | Path, **environment: str
) -> None:
    """Runs a program on a server with the shipped model, until it prints `8 sprites`.

    The sprites have the given prompts and the seeds 0 to 7. Keeps screenshots in `out/engines` for people.
    """
    seen: dict[bytes, NDArray[np.uint8]] = {}
    async with start() as running, screen(folder) as shown, safelight.Client(running.address) as client:
        program = await asyncio.create_subprocess_exec(
            *command,
            running.address,
            env=os.environ | {"DISPLAY": shown.display} | environment,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert program.stdout is not None
            finished = asyncio.ensure_future(program.stdout.readline())
            while not finished.done():
                pixels = await asyncio.to_thread(shown.pixels)
                seen.setdefault(pixels.tobytes(), pixels)
                await asyncio.wait([finished], timeout=0.02)
            assert finished.result() == b"8 sprites\n"
            pictures = [client.generate(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
            expected = [np.asarray((await picture.image()).convert("RGB")) for picture in pictures]
            rows = [np.concatenate(expected[at : at + COLUMNS], axis=1) for at in range(0, len(expected), COLUMNS)]
            sheet, until = np.concatenate(rows), time.monotonic() + DRAWN_S
            while not np.array_equal(last := shown.pixels(), sheet) and time.monotonic() < until:  # noqa: ASYNC110  # no event
                await asyncio.sleep(0.05)  # the screen draws what the program has sent when it gets to it
        finally:
            program.terminate()
            await program.wait()
    frames = list(seen.values())
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for part, pixels in (("middle", frames[len(frames) // 2]), ("end", last)):
        PIL.Image.fromarray(pixels).save(SCREENSHOTS / f"{name}-{part}.png")
    assert len(frames) > 3, "it is seen while it develops"
    for index, picture in enumerate(expected):
        row, column = divmod(index, COLUMNS)
        tile = last[row * SPRITE : (row + 1) * SPRITE, column * SPRITE : (column + 1) * SPRITE]
        assert np.array_equal(tile, picture), prompts[index]
