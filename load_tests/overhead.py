"""`python -m load_tests.overhead`: what the caches cost where nothing repeats.

Side by side in one run, rounds in turn: requests with prompts and seeds of their
own, once with BYPASS and once with DEFAULT and ALLOW_SIMILAR, on the simulated
runtime and, with `--runtime onnx`, on `icons`. The clients are a process of
their own. Prints the medians of the ratios of CPU and of time, and writes
out/overhead.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import uvloop
from rich.console import Console
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app import serving
from safelight_server.settings import load
from safelight_server.telemetry import configure_logging

OUT = Path("out/overhead.json")
MODELS = Path(__file__).parent.parent / "models"
MODES = {
    "bypass": pb.CachePolicy.MODE_BYPASS,
    "exact": pb.CachePolicy.MODE_DEFAULT,
    "similar": pb.CachePolicy.MODE_ALLOW_SIMILAR,
}
MIN_SIMILARITY = 1.0
"""So that even ALLOW_SIMILAR finds nothing: what is measured is looking and keeping."""


def request(number: int, mode: str, steps: int) -> pb.GenerateRequest:
    """One that no other is like; ALLOW_SIMILAR looks and finds no picture."""
    policy = pb.CachePolicy(mode=MODES[mode])
    if mode == "similar":
        policy.min_similarity = MIN_SIMILARITY
    spec = pb.GenerationSpec(
        prompt=f"icon {number} {mode}", num_inference_steps=steps, outputs=[pb.OutputSpec(seed=number)]
    )
    return pb.GenerateRequest(
        spec=spec, cache=policy, preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE),
        encoding=pb.PixelEncoding(media_type="application/x-raw-rgba8"),
    )  # fmt: skip


def ask_process(address: str, clients: int, steps: int, orders: Connection) -> None:
    """Clients that do what they are told: (mode, first number, count), until None."""
    uvloop.run(_ask(address, clients, steps, orders))


async def _ask(address: str, clients: int, steps: int, orders: Connection) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        while (order := await asyncio.to_thread(orders.recv)) is not None:
            mode, first, count = order
            numbers = iter(range(first, first + count))

            async def client(mode: str = mode, numbers: Any = numbers) -> None:
                for number in numbers:
                    async for _ in stub.Generate(request(number, mode, steps)):
                        pass

            await asyncio.gather(*(client() for _ in range(clients)))
            orders.send(True)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """CPU and wall seconds a picture by mode, and their ratios to BYPASS."""
    settings: dict[str, Any] = {"port": 0, "runtime": options.runtime, "log_level": "error", "models_dir": MODELS}
    if options.runtime == "simulated":
        settings |= {"simulated_base_ms": options.base_ms, "simulated_row_ms": options.row_ms}
    ours, theirs = multiprocessing.Pipe()
    samples: dict[str, list[tuple[float, float]]] = {mode: [] for mode in options.modes}
    async with serving(load(**settings)) as running:
        process = multiprocessing.get_context("spawn").Process(
            target=ask_process, args=(running.address, options.clients, options.steps, theirs)
        )
        process.start()
        first = 0
        for turn in range(options.rounds + 1):  # the first warms up
            for mode in options.modes if turn % 2 else reversed(options.modes):
                began, cpu = time.perf_counter(), time.process_time()
                ours.send((mode, first, options.requests))
                await asyncio.to_thread(ours.recv)
                spent = time.process_time() - cpu, time.perf_counter() - began
                first += options.requests
                if turn:
                    samples[mode].append(spent)
        ours.send(None)
        await asyncio.to_thread(process.join)
    return {"load": os.getloadavg()[0], "runtime": options.runtime} | _figures(samples, options.requests)


def _figures(samples: dict[str, list[tuple[float, float]]], count: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for mode, spent in samples.items():
        cpu, wall = (statistics.median(column) / count for column in zip(*spent, strict=True))
        ratios = [
            (mine[0] / theirs[0], mine[1] / theirs[1]) for mine, theirs in zip(spent, samples["bypass"], strict=True)
        ]
        cpu_ratio, wall_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
        figures[mode] = {
            "cpu_ms": 1e3 * cpu, "wall_ms": 1e3 * wall, "cpu_of_bypass": cpu_ratio, "wall_of_bypass": wall_ratio
        }  # fmt: skip
    return figures


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=("simulated", "onnx"), default="simulated")
    parser.add_argument("--base-ms", type=float, default=20.0, help="simulated: cost of a call")
    parser.add_argument("--row-ms", type=float, default=1.0, help="simulated: added cost of a row")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    configure_logging("console", "error")
    figures = uvloop.run(measure(options))
    Console(width=120).print_json(json.dumps(figures))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
