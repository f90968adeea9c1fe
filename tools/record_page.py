"""Records the contact sheet (the server's page) with its previews, as an animated WebP.

    make record     # writes docs/images/developing.webp

It starts a server with the shipped model and Debian's Chromium, sends the form,
and takes a screenshot after each preview that is shown. The times between frames are
chosen for viewers; they are not those of the model.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.async_api import FloatRect, Page, ViewportSize, async_playwright
from safelight_server.app.server import Running, serving
from safelight_server.settings import load

HTTP_PORT = 8080
VIEW: ViewportSize = {"width": 1180, "height": 900}
PROMPTS = (
    "a golden key on a dark background",
    "a steel sword on a dark background",
    "a blue shield on a dark background",
    "a glowing red potion on a dark background",
)
NUM_STEPS = 40
FRAME_MS, FIRST_MS, LAST_MS = 140, 900, 3000
MAX_FRAMES = 60
HEIGHT_PX, MARGIN_PX = 580, 16
"""CSS selector of the recorded part: the pictures, without the form above them."""


async def frames(running: Running) -> list[bytes]:
    """Takes screenshots of the sheet, as PNG, from the filled form to the finished pictures."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is needed: tools/install-system-packages")
    with tempfile.TemporaryDirectory(prefix="safelight-", dir="/tmp") as folder:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"], env={**os.environ, "TMPDIR": folder}
            )
            page = await browser.new_page(viewport=VIEW, color_scheme="dark")
            await page.goto(f"http://{running.http_address}/")
            shots = await _develop(page)
            await browser.close()
    return shots


async def _develop(page: Page) -> list[bytes]:
    await page.locator("#steps").fill(str(NUM_STEPS))
    await page.locator("#seed").fill("2")
    await page.get_by_role("combobox", name="Pictures").select_option("1")
    for prompt in PROMPTS:
        await page.get_by_label("Prompt").fill(prompt)
        await page.get_by_role("button", name="Develop", exact=True).click()
    top = await page.locator("#sheet").evaluate("sheet => sheet.getBoundingClientRect().top")
    clip: FloatRect = {"x": 0.0, "y": top - MARGIN_PX, "width": VIEW["width"], "height": HEIGHT_PX}
    shots = []
    for _ in range(MAX_FRAMES):
        shots.append(await page.screenshot(clip=clip))
        if await page.locator("#sheet .state", has_text="Finished").count() == len(PROMPTS):
            break
    return [*shots, await page.screenshot(clip=clip)]


def write(shots: list[bytes], path: Path) -> None:
    """Writes the screenshots as one animation that repeats."""
    images = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    durations = [FIRST_MS, *[FRAME_MS] * (len(images) - 2), LAST_MS]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
        quality=60,
        method=6,
        minimize_size=True,
    )


async def record(path: Path) -> None:
    """Makes the recording and writes it to `path`."""
    async with serving(load(port=0, http_port=HTTP_PORT)) as running:
        shots = await frames(running)
    write(shots, path)
    print(f"{path}: {len(shots)} frames")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images/developing.webp"))
    asyncio.run(record(parser.parse_args().out))
