"""`safelight bench`: load on a running server from this machine, and what its clients see of it."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from safelight import Client, Finished, GenerationError, PixelEncoding, Preview, PreviewPolicy

PROMPT = "a red potion on a dark background"


@dataclass(slots=True)
class Measurements:
    """Times that the clients measured, in seconds."""

    first_previews_s: list[float] = field(default_factory=list)
    totals_s: list[float] = field(default_factory=list)
    num_previews: int = 0
    refused: dict[str, int] = field(default_factory=dict)


async def bench(
    connect: Callable[[], Client], *, clients: int, pictures: int, steps: int | None, console: Console
) -> None:
    """`clients` clients that ask one after another until `pictures` pictures were asked for; prints a table."""
    seen = Measurements()
    numbers = iter(range(pictures))
    async with connect() as client:
        await client.models()  # the connection is up before the time runs

        async def ask() -> None:
            for number in numbers:
                await _one(client, number, steps, seen)

        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(ask())
        wall = time.monotonic() - began
    console.print(_table(seen, clients, wall))
    for reason, count in seen.refused.items():
        console.print(f"{count} refused or failed: {reason}")


async def _one(client: Client, seed: int, steps: int | None, seen: Measurements) -> None:
    raw = PixelEncoding(media_type="application/x-raw-rgba8")
    began, first = time.monotonic(), None
    try:
        async for event in client.generate(PROMPT, seed=seed, steps=steps, preview=PreviewPolicy(accept=[raw])):
            if isinstance(event, Preview):
                first = first or time.monotonic() - began
                seen.num_previews += 1
            elif isinstance(event, Finished):
                seen.totals_s.append(time.monotonic() - began)
    except GenerationError as error:
        reason = error.reason or error.code.name
        seen.refused[reason] = seen.refused.get(reason, 0) + 1
    if first is not None:
        seen.first_previews_s.append(first)


def _table(seen: Measurements, clients: int, wall_s: float) -> Table:
    done = len(seen.totals_s)
    table = Table(title=f"{clients} clients, {done} pictures in {wall_s:.2f} s: {done / wall_s:.2f} pictures/s")
    for column in ("", "median", "p90", "p99"):
        table.add_column(column, justify="right")
    for name, values in (("first preview", seen.first_previews_s), ("picture", seen.totals_s)):
        if values:
            cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
            table.add_row(name, *(f"{1e3 * cuts[at]:.0f} ms" for at in (49, 89, 98)))
    if done:
        table.caption = f"{seen.num_previews / done:.1f} previews a picture"
    return table
