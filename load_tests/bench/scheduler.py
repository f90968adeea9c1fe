"""Steps per second of the scheduler, compared with batches that are always full, and the gateway's CPU time.

The cost curve is the design's, 20 ms + 1 ms a row. Times are the server's own,
from the first batch of the first generation to the last step of the last. With
zero cost the simulated runtime answers at once, so all CPU of the server's process
is the gateway's: gRPC, admission, scheduler, sampler, streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.runtime.simulated import MAX_ROWS

from load_tests.bench import processes
from load_tests.bench.processes import Child, Usage
from load_tests.bench.requests import CHANNEL_OPTIONS, PROMPT
from load_tests.bench.runner import Report, Row, Target, median_by

BASE_MS, ROW_MS = 20.0, 1.0
BAR = 0.95


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `num_steps` steps with each of `num_generations`."""

    num_generations: tuple[int, ...] = (16, 64, 256)
    num_steps: tuple[int, ...] = (100, 80, 40)
    rounds: int = 3


SMOKE = Plan(num_generations=(2, 4), num_steps=(5, 5), rounds=1)


@dataclass(frozen=True, slots=True)
class Result:
    """Results of one run. `cpu_s` is the server's, from the first request to the last event."""

    num_generations: int
    num_steps: int
    seconds: float
    cpu_s: float


def measure(plan: Plan) -> Report:
    """Measures both tables."""
    with (
        processes.child(processes.obey) as clients,
        processes.child(processes.serve, _settings(plan, BASE_MS, ROW_MS)) as on_curve,
        processes.child(processes.serve, _settings(plan, 0.0, 0.0)) as at_zero,
    ):
        clients.first()
        addresses = {server: server.first() for server in (on_curve, at_zero)}
        results: dict[Child, list[Result]] = {server: [] for server in addresses}
        for _ in range(plan.rounds):
            for load in zip(plan.num_generations, plan.num_steps, strict=True):
                for server, address in addresses.items():
                    results[server].append(_one(clients, server, address, *load))
    ratios = median_by([_against_ideal(result) for result in results[on_curve]], ("generations",))
    costs = median_by([_cost(result) for result in results[at_zero]], ("generations",))
    targets = [
        Target(f"steps per second against the ideal at {row['generations']} generations", float(row["of_ideal"]), BAR)
        for row in ratios
    ]
    tables: dict[str, Sequence[Row]] = {
        f"Scheduler on the simulated runtime, {BASE_MS:.0f} ms + {ROW_MS:.0f} ms a row": ratios,
        "CPU of the server at zero cost": costs,
    }
    return Report("scheduler", tables, targets)


def _settings(plan: Plan, base_ms: float, row_ms: float) -> dict[str, object]:
    return {
        "runtime": "simulated", "num_instances": 1, "simulated_base_ms": base_ms, "simulated_row_ms": row_ms,
        "max_running_outputs": max(plan.num_generations), "max_waiting_per_caller": 1024, "max_waiting_outputs": 1024,
    }  # fmt: skip


def _one(clients: Child, server: Child, address: str, num_generations: int, num_steps: int) -> Result:
    clients.ask(develop, address, 1, 1)
    before: Usage = server.ask()
    seconds: float = clients.ask(develop, address, num_generations, num_steps)
    after: Usage = server.ask()
    return Result(num_generations, num_steps, seconds, after.cpu_s - before.cpu_s)


async def develop(address: str, num_generations: int, num_steps: int) -> float:
    """Requests all at once, without previews; returns seconds from first batch to last step, by the server's clock."""
    message = pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt=PROMPT, num_inference_steps=num_steps),
        preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE),
    )
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        stub = stubs.GenerationServiceStub(channel)
        spans = await asyncio.gather(*(_span(stub, message) for _ in range(num_generations)))
    return max(end for _, end in spans) - min(start for start, _ in spans)


async def _span(stub: stubs.GenerationServiceAsyncStub, message: pb.GenerateRequest) -> tuple[float, float]:
    events = [response.event async for response in stub.Generate(message)]
    timings = events[-1].finished.timings
    first_batch = (events[0].event_time.ToNanoseconds() + timings.queue.ToNanoseconds()) / 1e9
    return first_batch, first_batch + timings.denoise.ToNanoseconds() / 1e9


def _against_ideal(result: Result) -> Row:
    batch = min(result.num_generations, MAX_ROWS)
    rows = result.num_generations * result.num_steps
    ideal_s = rows / batch * (BASE_MS + ROW_MS * batch) / 1e3
    return {
        "generations": result.num_generations,
        "steps_per_s": rows / result.seconds,
        "ideal_steps_per_s": rows / ideal_s,
        "of_ideal": ideal_s / result.seconds,
        "cpu_share": result.cpu_s / result.seconds,
    }


def _cost(result: Result) -> Row:
    rows = result.num_generations * result.num_steps
    return {
        "generations": result.num_generations,
        "cpu_us_per_row_step": 1e6 * result.cpu_s / rows,
        "row_steps_per_s": rows / result.seconds,
    }
