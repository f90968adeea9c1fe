"""Latency of exact cache hits at a steady request rate (open loop).

A server has a few pictures of the simulated runtime in its cache, as large as
those of `icons`. Clients request them again as PNG at the given rate, whether or
not earlier answers have come; latency counts from when a request was due.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc
import numpy as np
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from load_tests.bench import processes
from load_tests.bench.processes import Usage
from load_tests.bench.runner import Report, Row, Target, median_by

SETTINGS: dict[str, object] = {"runtime": "simulated", "simulated_base_ms": 1.0, "simulated_row_ms": 0.1}
BAR_MS = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure; `rate` is in requests a second."""

    rate: float = 200.0
    seconds: float = 10.0
    num_pictures: int = 16
    rounds: int = 3


SMOKE = Plan(rate=20.0, seconds=0.5, num_pictures=2, rounds=1)


def measure(plan: Plan) -> Report:
    """Measures the latencies; returns the table."""
    rows: list[Row] = []
    with processes.child(processes.obey) as clients, processes.child(processes.serve, SETTINGS) as server:
        clients.first()
        address = server.first()
        clients.ask(develop, address, plan.num_pictures)
        for _ in range(plan.rounds):
            before: Usage = server.ask()
            seconds: list[float] = clients.ask(hit, address, plan)
            after: Usage = server.ask()
            quantiles = {f"p{q}_ms": 1e3 * float(np.quantile(seconds, q / 100)) for q in (50, 90, 99)}
            cpu_ms = 1e3 * (after.cpu_s - before.cpu_s) / len(seconds)
            rows.append({"rate": plan.rate, "hits": len(seconds), **quantiles, "server_cpu_ms_per_hit": cpu_ms})
    [row] = median_by(rows, ("rate",))
    target = Target(
        f"{BAR_MS:.0f} ms by the p99 of exact hits at {plan.rate:.0f}/s", BAR_MS / float(row["p99_ms"]), 1.0
    )
    return Report("hits", {"Exact hits, from when each was due": [row]}, [target])


async def develop(address: str, num_pictures: int) -> None:
    """Requests the pictures twice, so that pixels and encoded files are both cached."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        for _ in range(2):
            await asyncio.gather(*(_ask(stub, number) for number in range(num_pictures)))
            await asyncio.sleep(0.5)  # the server stores them in the background


async def hit(address: str, plan: Plan) -> list[float]:
    """Sends requests at the rate; returns the seconds from when each was due to its end.

    Raises:
        AssertionError: a request was not an exact hit.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        began, tasks = time.perf_counter() + 0.1, []
        for number in range(round(plan.rate * plan.seconds)):
            due = began + number / plan.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(_timed(stub, number % plan.num_pictures, due)))
        return await asyncio.gather(*tasks)


async def _timed(stub: stubs.GenerationServiceAsyncStub, number: int, due: float) -> float:
    finished = await _ask(stub, number)
    [result] = finished.cache_results
    assert result.disposition == pb.CacheResult.DISPOSITION_EXACT, result
    return time.perf_counter() - due


async def _ask(stub: stubs.GenerationServiceAsyncStub, number: int) -> pb.Finished:
    spec = pb.GenerationSpec(prompt="a red potion", num_inference_steps=4, outputs=[pb.OutputSpec(seed=number)])
    request = pb.GenerateRequest(spec=spec, encoding=pb.PixelEncoding(media_type="image/png"))
    events = [response.event async for response in stub.Generate(request)]
    return events[-1].finished
