"""The surge of `surge.py` on a virtual clock: the server's scheduler and admission alone, minutes in seconds of CPU.

The same arrivals meet the same rules. What is left out is what takes CPU: processes,
gRPC, the sampler, previews; a first preview counts from the end of its first step. So
equal settings give equal figures, whatever the machine does beside.

    python -m load_tests.bench.surge_simulation           # prints the tables of the real one

A variant changes who comes: clients that come late or never, callers and replicas.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from safelight_server.domain.errors import QueueFullError
from safelight_server.generations.admission import BATCH_ROOM, Admission, AdmissionLimits
from safelight_server.generations.pressure import Pressure
from safelight_server.runtime.simulated import MAX_ROWS, OTHERS
from safelight_server.scheduler import (
    Batch,
    Event,
    Kind,
    Limits,
    OutputDecoded,
    Priority,
    ScheduledOutput,
    Scheduler,
    StepCompleted,
)

from load_tests.bench.runner import Row
from load_tests.bench.surge import (
    BASE_MS,
    CLASS_WAIT_S,
    FLOOR,
    MAX_WAITING,
    ROW_MS,
    RUNNING,
    SHARES,
    STEPS,
    Outcome,
    Plan,
    arrivals,
    class_row,
    phase_row,
)

KEYS = {Kind.ENCODE: "encoder", Kind.DENOISE: "denoiser", Kind.DECODE: "decoder"}
PRESSURE_S = 1.0
"""The server looks so often whether a class is late."""
TAIL_S = 600
"""Seconds after the last phase in which the server still looks: those who were told to come later come then."""
ROUND_TRIP_S = 0.002
"""A refusal and the next request take so long."""


@dataclass(frozen=True, slots=True)
class Variant:
    """Who comes, and to whom.

    Attributes:
        num_replicas: servers; each request, and each retry, comes to any of them.
        num_callers: callers, of one tenant, that the requests are spread over.
        num_outputs: outputs of a request; there are so many times fewer requests.
        lateness: a client comes back later than it was told by up to this share of the time.
        lost_share: of those that were refused, the share that never comes back.
        max_running: outputs that take steps at once, of each server.
    """

    num_replicas: int = 1
    num_callers: int = 1
    num_outputs: int = 1
    lateness: float = 0.0
    lost_share: float = 0.0
    max_running: int = RUNNING


class Curve:
    """What calls cost: those of the simulated runtime."""

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        """Seconds of one call."""
        return (BASE_MS + ROW_MS * rows) / 1e3 * (1.0 if kind is Kind.DENOISE else OTHERS)


class Clock:
    """What happens when, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Calls it at that time."""
        heapq.heappush(self._events, (when, next(self._numbers), call))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()


class Replica:
    """One server: its scheduler, its admission, and one instance."""

    def __init__(self, clock: Clock, max_running: int) -> None:
        self.scheduler = Scheduler(Limits(max_running, lambda kind, key: MAX_ROWS, 1), Curve())
        room = dict.fromkeys(Priority, MAX_WAITING) | {Priority.BATCH: MAX_WAITING * BATCH_ROOM}
        self._admission = Admission(AdmissionLimits(room, 16 * MAX_WAITING))
        self._pressure = Pressure({Priority[name.upper()]: wait_s for name, wait_s in CLASS_WAIT_S.items()})
        self._clock = clock
        self._ids = itertools.count()
        self._outcomes: dict[int, Outcome] = {}
        self._left: dict[int, int] = {}
        self._is_busy = False
        self.busy_s = 0.0

    def look(self) -> None:
        """Updates which classes are late, as the server does every second."""
        self._pressure.update(self.scheduler.left_by_class_s(), 1)

    def ask(self, outcome: Outcome, caller: str, number: int, num_outputs: int) -> float | None:
        """Asks for the outputs of a request; None if it was let in, otherwise the delay in RetryInfo."""
        priority = Priority(outcome.priority - 1)
        steps = STEPS
        if outcome.has_floor and self._pressure.on(priority):
            steps = FLOOR
        ids = list(itertools.islice(self._ids, num_outputs))
        outputs = [ScheduledOutput(one, caller, priority, steps, 1, KEYS, ("prompt",)) for one in ids]
        try:
            self._admission.admit(self.scheduler, outputs[0], num_outputs, None, f"{caller} {number}", self._clock.now)
        except QueueFullError as refused:
            assert refused.retry_after_s is not None
            return refused.retry_after_s
        outcome.admitted, outcome.degraded = True, steps < STEPS
        outcome.admitted_s = self._clock.now - outcome.due
        self._left[number] = num_outputs
        for output in outputs:
            self._outcomes[output.output_id] = outcome
            self.scheduler.add(output, self._clock.now)
        self._dispatch()
        return None

    def _dispatch(self, *, full_only: bool = False) -> None:
        free = [] if self._is_busy else [0]
        for batch in self.scheduler.schedule(self._clock.now, free, full_only=full_only):
            seconds = Curve().seconds(batch.kind, batch.key, len(batch.rows))
            self._is_busy = True
            self.busy_s += seconds
            self._clock.at(self._clock.now + seconds, lambda batch=batch: self._returned(batch))  # type: ignore[misc]

    def _returned(self, batch: Batch) -> None:
        """As the engine does: outputs that fill a batch without those of this one do not wait for them."""
        self._is_busy = False
        if batch.kind is not Kind.ENCODE:
            self._dispatch(full_only=True)
        for event in self.scheduler.complete(batch.batch_id):
            self._note(event)
        self._dispatch()

    def _note(self, event: Event) -> None:
        match event:
            case StepCompleted(output_id=output_id):
                outcome = self._outcomes[output_id]
                if not outcome.first_preview_s:
                    outcome.first_preview_s = self._clock.now - outcome.due
            case OutputDecoded(output_id=output_id):
                outcome = self._outcomes.pop(output_id)
                outcome.picture_s = self._clock.now - outcome.due
            case _:
                pass


def simulate(plan: Plan, variant: Variant = Variant(), seed: int = 1) -> list[Outcome]:
    """Runs the phases and what is left after them."""
    clock = Clock()
    replicas = [Replica(clock, variant.max_running) for _ in range(variant.num_replicas)]
    draws = np.random.default_rng(seed)
    outcomes = [outcome for outcome in arrivals(plan, seed, variant.num_replicas / variant.num_outputs)]

    def ask(outcome: Outcome, number: int, tries_left: int) -> None:
        replica = replicas[int(draws.integers(len(replicas)))]
        caller = f"lab/{number % variant.num_callers}"
        wait_s = replica.ask(outcome, caller, number, variant.num_outputs)
        if wait_s is None:
            return
        outcome.refusals.append(wait_s)
        if tries_left and draws.random() >= variant.lost_share:
            late_s = ROUND_TRIP_S + wait_s * variant.lateness * draws.random()
            clock.at(clock.now + wait_s + late_s, lambda: ask(outcome, number, tries_left - 1))

    for number, outcome in enumerate(outcomes):
        clock.at(outcome.due, lambda outcome=outcome, number=number: ask(outcome, number, plan.max_tries - 1))  # type: ignore[misc]
    for second in range(int(sum(seconds for *_, seconds in plan.phases)) + TAIL_S):
        for replica in replicas:
            clock.at(second * PRESSURE_S, replica.look)
    clock.run()
    return outcomes


def tables(plan: Plan, outcomes: list[Outcome]) -> dict[str, list[Row]]:
    """The tables of the benchmark, of a simulation."""
    return {
        "By phase": [phase_row(phase, outcomes, plan) for phase in ("before", "surge", "after")],
        "In the surge, by class": [class_row(priority, outcomes) for priority in SHARES],
    }


def main() -> None:
    """Prints the tables of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in (*dataclasses.fields(Variant), *dataclasses.fields(Plan)):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    variant = Variant(**{field.name: given[field.name] for field in dataclasses.fields(Variant)})
    plan = Plan(**{field.name: given[field.name] for field in dataclasses.fields(Plan)})
    for title, rows in tables(plan, simulate(plan, variant)).items():
        print(title)
        for row in rows:
            cells = [
                f"{name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in row.items()
            ]
            print("  " + ", ".join(cells))


if __name__ == "__main__":
    main()
