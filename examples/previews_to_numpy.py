"""Receive the preview of every step as an array of pixels, and print how much each differs from the previous one."""

import asyncio
import sys

import numpy as np
import safelight

RAW = "application/x-raw-rgba8"


async def main(target: str = "127.0.0.1:8421") -> None:
    before = None
    async with safelight.Client(target) as client:
        async for event in client.generate("a red shield", seed=3, preview_media_type=RAW, media_type=RAW):
            if not isinstance(event, safelight.Preview | safelight.Picture):
                continue
            now = event.array()  # (height, width, 4) uint8
            name = f"step {event.step}" if isinstance(event, safelight.Preview) else "picture"
            if before is not None and before.shape == now.shape:
                print(f"{name}: {now.shape}, differs by {np.abs(now.astype(int) - before).mean():.1f} of 255")
            else:
                print(f"{name}: {now.shape}")
            before = now


asyncio.run(main(*sys.argv[1:]))
