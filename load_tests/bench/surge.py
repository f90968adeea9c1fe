"""A surge: five times the load for minutes, on a real server with admission on.

The simulated runtime sleeps as a GPU would, so that what is measured is who is
let in, who starts when, and what is given up. Requests of three classes arrive
in an open loop (Poisson); half of those of STANDARD and BATCH have a quality
floor. A client that is refused waits as it was told and asks again. Times count
from when a request was due, for those that were let in at once.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import grpc
import numpy as np
import uvloop
from google.rpc import error_details_pb2, status_pb2
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from load_tests.bench import processes
from load_tests.bench.arrivals import schedule
from load_tests.bench.requests import CHANNEL_OPTIONS, COMPUTE, PROMPT, RAW
from load_tests.bench.runner import Report, Row, Target

BASE_MS, ROW_MS = 20.0, 1.0
RUNNING = 16
MAX_WAITING = 64
CLASS_WAIT_S = {"interactive": 1.0, "standard": 1.0, "batch": 5.0}
STEPS, FLOOR = 20, 8
CAPACITY = RUNNING / (BASE_MS + ROW_MS * RUNNING) * 1e3 / STEPS
"""Pictures a second by the steps alone, 20 of each. Decoding takes calls too, so that the server makes fewer."""
SHARES = {pb.PRIORITY_INTERACTIVE: 0.2, pb.PRIORITY_STANDARD: 0.3, pb.PRIORITY_BATCH: 0.5}
"""Of the requests, by class."""
STRETCH = 1.5
"""How much later, at most, the first preview of an INTERACTIVE request may come in the surge than before it."""
CHANNELS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure.

    Attributes:
        warmup_s: of a phase before the three that is not counted: what is done for the first time takes longer.
        before_s, surge_s, after_s: of the three phases.
        load: requests a second before and after, by what the server can make.
        factor: how many times as many come in the surge.
        max_tries: how often a client asks, at most.
    """

    warmup_s: float = 10.0
    before_s: float = 60.0
    surge_s: float = 180.0
    after_s: float = 60.0
    load: float = 0.5
    factor: float = 5.0
    max_tries: int = 20

    @property
    def phases(self) -> Sequence[tuple[str, float, float]]:
        """Each phase with its factor of the load and its seconds."""
        return (
            ("warm-up", 1.0, self.warmup_s),
            ("before", 1.0, self.before_s),
            ("surge", self.factor, self.surge_s),
            ("after", 1.0, self.after_s),
        )


SMOKE = Plan(warmup_s=0.5, before_s=1.0, surge_s=2.0, after_s=0.5, factor=4.0, max_tries=2)


@dataclass(slots=True)
class Outcome:
    """What became of a request; times in seconds from when it was due, 0: it did not come to that.

    Attributes:
        phase: when it was due.
        due: seconds from the start of the first phase; other times count from it.
        refusals: for each refusal, the delay in its RetryInfo; None where it had none.
        admitted: the server accepted the request, at whichever try.
        admitted_s: when it did.
        failed: the error with which the request ended; empty where it did not fail.
    """

    phase: str
    priority: int
    has_floor: bool
    due: float
    refusals: list[float | None] = field(default_factory=list)
    admitted: bool = False
    admitted_s: float = 0.0
    degraded: bool = False
    failed: str = ""
    first_preview_s: float = 0.0
    picture_s: float = 0.0


def measure(plan: Plan) -> Report:
    """Runs the three phases and waits for what is under way."""
    with processes.child(processes.serve, _settings()) as server:
        outcomes = uvloop.run(_load(server.first(), plan))
    by_phase = [phase_row(phase, outcomes, plan) for phase in ("before", "surge", "after")]
    seen = [class_row(priority, outcomes) for priority in SHARES]
    before, surge = (float(row["interactive_first_ms_p99"]) for row in by_phase[:2])
    told = [wait for one in outcomes for wait in one.refusals]
    what = f"p99 of INTERACTIVE's first preview within {STRETCH:g} times of before"
    targets = [Target(what, STRETCH * before / surge, 1.0)]
    if told:
        share = sum(wait is not None for wait in told) / len(told)
        targets.append(Target("share of refusals that say when", share, 1.0))
    rate = plan.load * CAPACITY
    note = f"{rate:.1f} requests a second, in the surge {plan.factor * rate:.1f}; the steps alone allow {CAPACITY:.1f}"
    failed = Counter(one.failed for one in outcomes if one.failed)
    notes = (note, *(f"{count} failed: {why}" for why, count in failed.items()))
    tables: dict[str, Sequence[Row]] = {"By phase": by_phase, "In the surge, by class": seen}
    return Report("surge", tables, targets, notes)


def _settings() -> dict[str, object]:
    return {
        "runtime": "simulated", "num_instances": 1, "simulated_base_ms": BASE_MS, "simulated_row_ms": ROW_MS,
        "max_running_outputs": RUNNING, "max_waiting_outputs": MAX_WAITING, "max_waiting_per_caller": 16 * MAX_WAITING,
        "max_streams_per_caller": 4096, "class_wait_s": CLASS_WAIT_S,
    }  # fmt: skip


async def _load(address: str, plan: Plan) -> list[Outcome]:
    """Sends all requests when they are due."""
    channels = [grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) for _ in range(CHANNELS)]
    services = [stubs.GenerationServiceStub(channel) for channel in channels]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    outcomes = arrivals(plan)
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, outcome in enumerate(outcomes):
            request = _request(number, outcome.priority, outcome.has_floor)
            group.create_task(_ask(services[number % CHANNELS], request, outcome, start, plan.max_tries))
    for channel in channels:
        await channel.close()
    return outcomes


def arrivals(plan: Plan, seed: int = 1, scale: float = 1.0) -> list[Outcome]:
    """All requests of the phases, in the order in which they are due.

    Args:
        scale: how many times as many requests come as the plan says.
    """
    draws = np.random.default_rng(seed)
    outcomes: list[Outcome] = []
    start = 0.0
    for number, (phase, factor, seconds) in enumerate(plan.phases, 4 * (seed - 1)):
        for at in schedule(factor * plan.load * CAPACITY * scale, seconds, number):
            priority = int(draws.choice(list(SHARES), p=list(SHARES.values())))
            has_floor = priority != pb.PRIORITY_INTERACTIVE and draws.random() < 0.5
            outcomes.append(Outcome(phase, priority, has_floor, start + at))
        start += seconds
    return outcomes


def _request(seed: int, priority: int, has_floor: bool) -> pb.GenerateRequest:
    spec = pb.GenerationSpec(prompt=PROMPT, num_inference_steps=STEPS, outputs=[pb.OutputSpec(seed=seed)])
    watched = priority == pb.PRIORITY_INTERACTIVE
    preview = pb.PreviewPolicy(accept=[RAW]) if watched else pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
    return pb.GenerateRequest(
        spec=spec,
        request_id=str(uuid.uuid4()),
        preview=preview,
        encoding=RAW,
        cache=COMPUTE,
        scheduling=pb.Scheduling(priority=cast(pb.Priority.ValueType, priority)),
        quality_floor=pb.QualityFloor(min_num_steps=FLOOR) if has_floor else None,
    )


async def _ask(
    stub: stubs.GenerationServiceAsyncStub, request: pb.GenerateRequest, outcome: Outcome, start: float, max_tries: int
) -> None:
    """Sends a request, and retries after the delay of each RetryInfo, until the server accepts it."""
    due = start + outcome.due
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    for _ in range(max_tries):
        try:
            async for response in stub.Generate(request):
                event, passed_s = response.event, time.perf_counter() - due
                if not outcome.admitted:
                    outcome.admitted, outcome.admitted_s = True, passed_s
                if event.HasField("preview") and not outcome.first_preview_s:
                    outcome.first_preview_s = passed_s
                elif event.HasField("finished"):
                    outcome.picture_s = passed_s
                    outcome.degraded = bool(event.finished.degradations)
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                outcome.failed = f"{error.code().name}: {error.details()}"
                return
            wait_s = _retry_after_s(error)
            outcome.refusals.append(wait_s)
            if wait_s is None:
                return
            await asyncio.sleep(wait_s)


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    found = error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(bytes(details)).details:
        if detail.Unpack(found):
            return float(found.retry_delay.ToNanoseconds() / 1e9)
    return None


def phase_row(phase: str, outcomes: Sequence[Outcome], plan: Plan) -> Row:
    """What became of the requests of a phase, and how many pictures were finished in it, whenever asked for."""
    of_phase = [one for one in outcomes if one.phase == phase]
    at_once = [one for one in of_phase if not one.refusals]
    interactive = [one for one in at_once if one.priority == pb.PRIORITY_INTERACTIVE]
    row: dict[str, float | int | str] = {"phase": phase, "requests": len(of_phase)}
    row["interactive_first_ms_p50"] = _percentile(interactive, 50, lambda one: one.first_preview_s) * 1e3
    row["interactive_first_ms_p99"] = _percentile(interactive, 99, lambda one: one.first_preview_s) * 1e3
    for name, priority in (("standard", pb.PRIORITY_STANDARD), ("batch", pb.PRIORITY_BATCH)):
        of_class = [one for one in at_once if one.priority == priority]
        row[f"{name}_picture_s_p50"] = _percentile(of_class, 50, lambda one: one.picture_s)
    row["refused_share"] = 1 - len(at_once) / max(1, len(of_phase))
    names = [name for name, *_ in plan.phases]
    begin = sum(seconds for *_, seconds in plan.phases[: names.index(phase)])
    seconds = plan.phases[names.index(phase)][2]
    row["pictures_per_s"] = (
        sum(begin <= one.due + one.picture_s < begin + seconds for one in outcomes if one.picture_s) / seconds
    )
    row["degraded_share"] = sum(one.degraded for one in of_phase) / max(1, len(of_phase))
    return row


def class_row(priority: int, outcomes: Iterable[Outcome]) -> Row:
    """What became of the requests of a class; of those that asked again, the share that was let in then."""
    of_class = [one for one in outcomes if one.phase == "surge" and one.priority == priority]
    refused = [one for one in of_class if one.refusals]
    num_again = sum(len(one.refusals) - (not one.admitted) for one in refused)
    floors = [one for one in of_class if one.has_floor and one.admitted]
    told = [wait for one in refused for wait in one.refusals if wait is not None]
    return {
        "class": pb.Priority.Name(cast(pb.Priority.ValueType, priority)).removeprefix("PRIORITY_").lower(),
        "requests": len(of_class),
        "refused_share": len(refused) / max(1, len(of_class)),
        "told_s_p50": float(np.median(told)) if told else 0.0,
        "told_s_max": max(told, default=0.0),
        "asked_again": num_again,
        "let_in_then_share": sum(one.admitted for one in refused) / max(1, num_again),
        "until_let_in_s_p50": _percentile(refused, 50, lambda one: one.admitted_s),
        "until_let_in_s_p99": _percentile(refused, 99, lambda one: one.admitted_s),
        "let_in_share": sum(one.admitted for one in of_class) / max(1, len(of_class)),
        "degraded_of_those_with_a_floor": sum(one.degraded for one in floors) / max(1, len(floors)),
    }


def _percentile(outcomes: Iterable[Outcome], percent: int, of: Callable[[Outcome], float]) -> float:
    values = [seconds for one in outcomes if (seconds := of(one))]
    return float(np.percentile(values, percent)) if values else 0.0
