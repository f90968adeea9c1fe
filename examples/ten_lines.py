"""Request a picture and save it."""

import asyncio
import sys
from pathlib import Path

import safelight


async def main(target: str = "127.0.0.1:8421") -> None:
    async with safelight.Client(target) as client:
        async for event in client.generate("a golden key on a blue background", seed=7):
            if isinstance(event, safelight.Picture):
                Path("key.png").write_bytes(event.data)


asyncio.run(main(*sys.argv[1:]))
