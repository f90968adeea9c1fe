"""Puts load on a running server from this machine and prints the clients' measurements: `make bench-server`."""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table
from safelight import Client, Finished, GenerationError, PixelEncoding, Preview, PreviewPolicy

PROMPT = "a red potion on a dark background"


@dataclass(slots=True)
class ClientFigures:
    """Times that the clients measured, in seconds, and requests that failed, by reason."""

    first_previews_s: list[float] = field(default_factory=list)
    totals_s: list[float] = field(default_factory=list)
    num_previews: int = 0
    refused: dict[str, int] = field(default_factory=dict)


async def bench(
    connect: Callable[[], Client], *, clients: int, pictures: int, steps: int | None, console: Console
) -> None:
    """Runs `clients` clients at once until `pictures` pictures were requested, and prints a table."""
    seen = ClientFigures()
    numbers = iter(range(pictures))
    async with connect() as client:
        await client.models()  # connects before the measurement begins

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


async def _one(client: Client, seed: int, steps: int | None, seen: ClientFigures) -> None:
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


def _table(seen: ClientFigures, clients: int, wall_s: float) -> Table:
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


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.bench.running_server", description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:8421", help="address of the server")
    parser.add_argument("--clients", type=int, default=4, help="clients that ask at once")
    parser.add_argument("--pictures", type=int, default=20, help="pictures to ask for, over all clients")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's default where absent")
    parser.add_argument("--api-key", default=os.environ.get("SAFELIGHT_API_KEY"), help="or SAFELIGHT_API_KEY")
    parser.add_argument("--ca-file", type=Path, help="PEM of the server's certificate authority; enables TLS")
    parser.add_argument("--server-name", default="", help="in the certificate, if it is not the target's")
    given = parser.parse_args(arguments)
    if given.clients < 1 or given.pictures < 1:
        parser.error("--clients and --pictures must be at least 1")
    credentials = None if given.ca_file is None else grpc.ssl_channel_credentials(given.ca_file.read_bytes())

    def connect() -> Client:
        return Client(
            given.target,
            api_key=given.api_key,
            credentials=credentials,
            server_name=given.server_name,
            retries=0,  # a refusal is counted, not waited for
        )

    measuring = bench(connect, clients=given.clients, pictures=given.pictures, steps=given.steps, console=Console())
    try:
        asyncio.run(measuring)
    except GenerationError as error:
        sys.exit(f"{given.target}: {error}")


if __name__ == "__main__":
    main()
