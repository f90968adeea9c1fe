"""`python -m load_tests.hits`: how long exact hits take, asked for at a steady rate by another process (open loop).

A server of this process keeps a few pictures of the simulated runtime, as large
as those of `icons`; clients in a process of their own ask for them again at the
given rate, whether earlier answers have come or not, and measure from the time
at which a request was due. Prints quantiles and the server's CPU per hit, and
writes out/hits.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
import uvloop
from rich.console import Console
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app import serving, settle
from safelight_server.settings import load
from safelight_server.telemetry import configure_logging

OUT = Path("out/hits.json")
QUANTILES = (0.5, 0.9, 0.99)


def request(number: int, media_type: str) -> pb.GenerateRequest:
    """One of the pictures."""
    spec = pb.GenerationSpec(prompt="a red potion", num_inference_steps=4, outputs=[pb.OutputSpec(seed=number)])
    return pb.GenerateRequest(spec=spec, encoding=pb.PixelEncoding(media_type=media_type))


def ask_process(address: str, options: argparse.Namespace, answers: Connection) -> None:
    """The clients; sends back when it begins, then seconds by request, and how many were no exact hits."""
    answers.send(uvloop.run(ask(address, options, answers)))


async def ask(address: str, options: argparse.Namespace, answers: Connection) -> tuple[list[float], int]:
    """First all pictures once, then again at the rate."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)

        async def one(number: int, due: float) -> tuple[float, bool]:
            async for response in stub.Generate(request(number % options.pictures, options.media_type)):
                event = response.event
            exact = event.finished.cache_results[0].disposition == pb.CacheResult.DISPOSITION_EXACT
            return time.perf_counter() - due, exact

        for _ in range(2):  # developed, then encoded for the first time
            await asyncio.gather(*(one(number, 0.0) for number in range(options.pictures)))
            await asyncio.sleep(0.5)
        answers.send("begun")
        began, tasks = time.perf_counter() + 0.1, []
        for number in range(round(options.rate * options.seconds)):
            due = began + number / options.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(number, due)))
        found = await asyncio.gather(*tasks)
    return [seconds for seconds, _ in found], sum(not exact for _, exact in found)


async def measure(options: argparse.Namespace) -> dict[str, float]:
    """Figures of one run."""
    settings = {"port": 0, "runtime": "simulated", "simulated_base_ms": 1.0, "simulated_row_ms": 0.1}
    ours, theirs = multiprocessing.Pipe()
    async with serving(load(log_level="error", **settings)) as running:
        process = multiprocessing.get_context("spawn").Process(
            target=ask_process, args=(running.address, options, theirs)
        )
        settle()
        process.start()
        await asyncio.to_thread(ours.recv)
        began, cpu = time.perf_counter(), time.process_time()
        seconds, misses = await asyncio.to_thread(ours.recv)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        await asyncio.to_thread(process.join)
    figures = {f"p{100 * q:.0f}_ms": 1e3 * float(np.quantile(seconds, q)) for q in QUANTILES}
    return {
        "hits": len(seconds),
        "no_hits": misses,
        "rate": options.rate,
        **figures,
        "server_cpu_ms_per_hit": 1e3 * cpu / len(seconds),
        "wall_s": wall,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--media-type", default="image/png")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    configure_logging("console", "error")
    figures = uvloop.run(measure(options))
    Console().print({name: round(figure, 3) for name, figure in figures.items()})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
