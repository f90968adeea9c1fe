"""Overhead of the caches when no request repeats.

Each request has a prompt and seed of its own. Rounds with BYPASS, DEFAULT and
ALLOW_SIMILAR take turns: on the simulated runtime with the design's cost curve
(20 ms + 1 ms a row), and on `icons`. The difference is the cost of lookups and of
storing. On the simulated runtime the prompts' vectors are unrelated, so a lookup
compares everything that is stored and finds nothing; on `icons` each request has a
guidance scale of its own, which no stored picture has.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from load_tests.bench import processes
from load_tests.bench.processes import Child, Usage
from load_tests.bench.requests import RAW
from load_tests.bench.runner import Report, Row, Target, median_by

MODES = {
    "bypass": pb.CachePolicy.MODE_BYPASS,
    "exact": pb.CachePolicy.MODE_DEFAULT,
    "similar": pb.CachePolicy.MODE_ALLOW_SIMILAR,
}
BAR = 0.98


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `num_pictures` in each mode of a round, by runtime."""

    num_pictures: tuple[tuple[str, int], ...] = (("simulated", 64), ("onnx", 96))
    num_steps: int = 20
    num_clients: int = 16
    rounds: int = 9
    models: Path = Path("models")


SMOKE = Plan((("simulated", 4),), num_steps=3, num_clients=2, rounds=1)


def measure(plan: Plan) -> Report:
    """Measures a table for each runtime."""
    tables, targets = {}, []
    for runtime, num_pictures in plan.num_pictures:
        rows = median_by(_rounds(plan, runtime, num_pictures), ("mode",))
        tables[f"Requests without repeats on {runtime}"] = rows
        targets += [
            Target(f"{row['mode']} on {runtime}, throughput of BYPASS", float(row["throughput_of_bypass"]), BAR)
            for row in rows
            if row["mode"] != "bypass"
        ]
    return Report("overhead", tables, targets)


def _rounds(plan: Plan, runtime: str, num_pictures: int) -> Iterator[Row]:
    settings: dict[str, object] = {"runtime": runtime, "models_dir": plan.models}
    numbers = itertools.count(step=num_pictures)
    with processes.child(processes.obey) as clients, processes.child(processes.serve, settings) as server:
        clients.first()
        address = server.first()
        for turn in range(plan.rounds + 1):  # the first warms up
            order = list(MODES) if turn % 2 else list(reversed(MODES))
            spent = {
                mode: _one(clients, server, address, plan, runtime, mode, next(numbers), num_pictures) for mode in order
            }
            base_s, base_cpu_s = spent["bypass"]
            for mode, (wall_s, cpu_s) in spent.items() if turn else ():
                yield {
                    "mode": mode,
                    "ms_per_picture": 1e3 * wall_s / num_pictures,
                    "server_cpu_ms_per_picture": 1e3 * cpu_s / num_pictures,
                    "throughput_of_bypass": base_s / wall_s,
                    "cpu_of_bypass": cpu_s / base_cpu_s,
                }


def _one(
    clients: Child, server: Child, address: str, plan: Plan, runtime: str, mode: str, first: int, num_pictures: int
) -> tuple[float, float]:
    before: Usage = server.ask()
    requests = range(first, first + num_pictures)
    wall_s: float = clients.ask(ask, address, mode, requests, plan.num_clients, plan.num_steps, runtime == "onnx")
    after: Usage = server.ask()
    return wall_s, after.cpu_s - before.cpu_s


async def ask(address: str, mode: str, requests: range, num_clients: int, num_steps: int, alike: bool) -> float:
    """Seconds until all pictures have come; each client sends one request after another.

    Args:
        alike: whether prompts are similar; each request then has a guidance scale of its own.

    Raises:
        RuntimeError: a picture came from a cache.
    """
    numbers = iter(requests)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)

        async def client() -> None:
            for number in numbers:
                async for response in stub.Generate(_request(number, mode, num_steps, alike)):
                    results = response.event.finished.cache_results
                if results[0].disposition != pb.CacheResult.DISPOSITION_MISS:
                    raise RuntimeError(f"request {number} repeats an earlier one: {results[0]}")

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        return time.perf_counter() - began


def _request(number: int, mode: str, num_steps: int, alike: bool) -> pb.GenerateRequest:
    outputs = [pb.OutputSpec(seed=number)]
    digest = hashlib.blake2b(str(number).encode(), digest_size=8).hexdigest()
    spec = pb.GenerationSpec(prompt=digest, num_inference_steps=num_steps, guidance_scale=3.0, outputs=outputs)
    if alike:
        spec.prompt, spec.guidance_scale = f"icon {number}", 2 + number / 1000
    return pb.GenerateRequest(
        spec=spec,
        cache=pb.CachePolicy(mode=MODES[mode]),
        preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE),
        encoding=RAW,
    )
