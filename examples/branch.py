"""Develop a picture, then another one that begins from a step of the first, with another prompt.

The server keeps the steps at 10, 20, 30, 40 and 50 % of the way. A branch begins from the last kept step that is not
after the step it names.
"""

import asyncio
import sys
from pathlib import Path

import safelight


async def main(target: str = "127.0.0.1:8421") -> None:
    async with safelight.Client(target) as client:
        async for event in client.generate("a glowing red potion on a dark background", seed=7):
            if isinstance(event, safelight.Picture):
                Path("potion.png").write_bytes(event.data)
            elif isinstance(event, safelight.Finished):
                first = event.generation
        branch = safelight.Branch(generation=first, step=6)
        async for event in client.generate("a glowing blue potion on a dark background", seed=7, branch=branch):
            if isinstance(event, safelight.Picture):
                Path("branch.png").write_bytes(event.data)
            elif isinstance(event, safelight.Finished):
                [origin] = event.origins
                print(f"{origin.disposition}: {origin.num_steps_skipped} steps were not made again")


asyncio.run(main(*sys.argv[1:]))
