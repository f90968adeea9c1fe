"""Steps per second on the simulated runtime against batches that are always full; the gateway's CPU beside it.

The curve is the design's, 20 ms + 1 ms a row. Times are the server's own, from
the first batch of the first generation to the last step of the last. At zero
cost the runtime answers at once, so all CPU of the server's process is the
gateway's: gRPC, admission, scheduler, sampler, streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.runtime.simulated import MAX_ROWS

from load_tests import processes
from load_tests.clients import CHANNEL_OPTIONS, PROMPT
from load_tests.runner import Report, Row, Target, median_by

BASE_MS, ROW_MS = 20.0, 1.0
BAR = 0.95


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure. `num_steps` are for each of `num_generations`."""

    num_generations: tuple[int, ...] = (16, 64, 256)
    num_steps: tuple[int, ...] = (100, 80, 40)
    rounds: int = 3


SMOKE = Plan(num_generations=(2, 4), num_steps=(5, 5), rounds=1)


def measure(plan: Plan) -> Report:
    """Both tables."""
    with processes.child(processes.obey) as clients:
        clients.first()
        on_curve = [_one(clients, *load, BASE_MS, ROW_MS) for load in _loads(plan)]
        at_zero = [_one(clients, *load, 0.0, 0.0) for load in _loads(plan)]
    ratios = median_by([_against_ideal(*result) for result in on_curve], ("generations",))
    costs = median_by([_cost(*result) for result in at_zero], ("generations",))
    targets = [
        Target(f"steps per second against the ideal at {row['generations']} generations", float(row["of_ideal"]), BAR)
        for row in ratios
    ]
    tables: dict[str, Sequence[Row]] = {
        f"Scheduler on the simulated runtime, {BASE_MS:.0f} ms + {ROW_MS:.0f} ms a row": ratios,
        "CPU of the server at zero cost": costs,
    }
    return Report("scheduler", tables, targets)


def _loads(plan: Plan) -> list[tuple[int, int]]:
    return list(zip(plan.num_generations, plan.num_steps, strict=True)) * plan.rounds


def _one(
    clients: processes.Child, num_generations: int, num_steps: int, base_ms: float, row_ms: float
) -> tuple[int, int, float, float]:
    """Generations, steps, seconds and CPU seconds of the server."""
    settings = {
        "runtime": "simulated", "num_instances": 1, "simulated_base_ms": base_ms, "simulated_row_ms": row_ms,
        "max_running_outputs": num_generations, "max_waiting_per_caller": 1024, "max_waiting_standard": 1024,
    }  # fmt: skip
    with processes.child(processes.serve, settings) as server:
        address = server.first()
        clients.ask(develop, address, 1, 1)
        before: processes.Usage = server.ask()
        seconds: float = clients.ask(develop, address, num_generations, num_steps)
        after: processes.Usage = server.ask()
    return num_generations, num_steps, seconds, after.cpu_s - before.cpu_s


async def develop(address: str, num_generations: int, num_steps: int) -> float:
    """Asks for all at once, without previews; seconds from the first batch to the last step, on the server's clock."""
    message = pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt=PROMPT, num_inference_steps=num_steps),
        preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE),
    )
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        stub = stubs.GenerationServiceStub(channel)
        spans = await asyncio.gather(*(_span(stub, message) for _ in range(num_generations)))
    return max(end for _, end in spans) - min(start for start, _ in spans)


async def _span(stub: stubs.GenerationServiceStub, message: pb.GenerateRequest) -> tuple[float, float]:
    events = [response.event async for response in stub.Generate(message)]
    timings = events[-1].finished.timings
    first_batch = (events[0].event_time.ToNanoseconds() + timings.queue.ToNanoseconds()) / 1e9
    return first_batch, first_batch + timings.denoise.ToNanoseconds() / 1e9


def _against_ideal(num_generations: int, num_steps: int, seconds: float, cpu_s: float) -> Row:
    batch = min(num_generations, MAX_ROWS)
    ideal_s = num_generations * num_steps / batch * (BASE_MS + ROW_MS * batch) / 1e3
    return {
        "generations": num_generations,
        "steps_per_s": num_generations * num_steps / seconds,
        "ideal_steps_per_s": num_generations * num_steps / ideal_s,
        "of_ideal": ideal_s / seconds,
        "cpu_share": cpu_s / seconds,
    }


def _cost(num_generations: int, num_steps: int, seconds: float, cpu_s: float) -> Row:
    rows = num_generations * num_steps
    return {
        "generations": num_generations,
        "cpu_us_per_row_step": 1e6 * cpu_s / rows,
        "row_steps_per_s": rows / seconds,
    }
