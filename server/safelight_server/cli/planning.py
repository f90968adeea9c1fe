"""How many replicas a load needs, from measured times of calls. Pure arithmetic; `plan.py` reads files and prints.

All outputs that an instance develops share its calls: a call takes longer with more rows, not every output its turn.
With N outputs present each step takes t(N x rows), an output stays for S such steps, and by Little's law N = rate x S x
t(N x rows). The instance is stable while the rows that arrive in a second are fewer than those of its largest batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Z99 = 2.326
"""The 99th percentile of the standard normal distribution."""
MAX_REPLICAS = 100_000
ROUNDS = 10_000
"""Iterations towards the number of outputs present; beyond it the load counts as too much."""


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Measured seconds of a call by its rows; rows rise and begin with 1."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def max_rows(self) -> int:
        """Rows of the largest call that was measured: no larger ones are made."""
        return self.rows[-1]

    @property
    def rows_per_s(self) -> float:
        """Rows that one instance can make in a second: those of the best batch size."""
        return max(rows / seconds for rows, seconds in zip(self.rows, self.seconds, strict=True))

    def at(self, rows: float) -> float:
        """Seconds of so many rows: interpolated; more than `max_rows` take several calls."""
        if rows > self.max_rows:
            return rows / self.max_rows * self.seconds[-1]
        rows = max(rows, self.rows[0])
        for (r0, s0), (r1, s1) in zip(self._points, self._points[1:], strict=False):
            if rows <= r1:
                return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)
        return self.seconds[-1]

    @property
    def _points(self) -> list[tuple[int, float]]:
        return list(zip(self.rows, self.seconds, strict=True))


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """Measured times of a model's components.

    Attributes:
        other_s: seconds of a picture in calls of one row: text encoder and decoder.
        encode_s: the text encoder's part of them.
    """

    denoiser: CallTimes
    encode_s: float
    decode_s: float

    @property
    def other_s(self) -> float:
        """Seconds of a picture beside its steps, in calls of one row."""
        return self.encode_s + self.decode_s


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """One kind of request.

    Attributes:
        images_per_s: that are developed; those that caches serve do not count.
        rows_per_step: 2 with guidance, else 1; with a guidance interval the mean over the steps.
        step_cost: of a step, as a multiple of one of the size that was measured.
    """

    model: str
    images_per_s: float
    num_steps: int
    rows_per_step: float
    step_cost: float = 1.0

    @property
    def rows_per_s(self) -> float:
        """Denoiser rows a second."""
        return self.images_per_s * self.num_steps * self.rows_per_step


@dataclass(frozen=True, slots=True)
class Expectation:
    """What one instance is expected to do under its part of the load.

    Attributes:
        utilization: share of the most that it could do.
        outputs: that it develops at once, mean; infinite where it cannot keep up.
        first_preview_p50_s, first_preview_p99_s: from acceptance to the end of the first step's call.
    """

    utilization: float
    outputs: float
    step_s: float
    first_preview_p50_s: float
    first_preview_p99_s: float


def expect(loads: Sequence[PlannedLoad], times: Mapping[str, ModelTimes], part: float) -> Expectation:
    """What an instance does that gets the share `part` (0 to 1) of all loads."""
    other = sum(load.images_per_s * times[load.model].other_s for load in loads) * part
    steps = sum(load.rows_per_s * load.step_cost / times[load.model].denoiser.rows_per_s for load in loads) * part
    utilization = other + steps
    if utilization >= 1.0:
        return Expectation(utilization, math.inf, math.inf, math.inf, math.inf)
    left = 1.0 - other  # of each second, for steps

    def round_s(outputs: Mapping[int, float]) -> float:
        """One step of all outputs: a call of each model that has some."""
        rows: dict[str, float] = {}
        cost: dict[str, float] = {}
        for at, load in enumerate(loads):
            rows[load.model] = rows.get(load.model, 0.0) + outputs[at] * load.rows_per_step
            cost[load.model] = max(cost.get(load.model, 0.0), load.step_cost)
        return sum(cost[model] * times[model].denoiser.at(count) for model, count in rows.items()) / left

    def present(step_s: float) -> dict[int, float]:
        return {at: load.images_per_s * part * load.num_steps * step_s for at, load in enumerate(loads)}

    step_s = round_s(dict.fromkeys(range(len(loads)), 0.0))
    for _ in range(ROUNDS):
        after = round_s(present(step_s))
        if abs(after - step_s) < 1e-9:
            break
        step_s = after
    else:
        return Expectation(utilization, math.inf, math.inf, math.inf, math.inf)
    outputs = present(step_s)
    total = sum(outputs.values())
    busy = 1.0 + Z99 / math.sqrt(max(total, 1e-9)) if total >= 1 else 0.0
    crowded_s = round_s({at: max(1.0, count * busy) for at, count in outputs.items()}) if busy else step_s
    encode_s = max(times[load.model].encode_s for load in loads)
    likely_busy = min(1.0, total)
    p50 = likely_busy * step_s / 2 + encode_s + step_s
    p99 = crowded_s + encode_s + crowded_s
    return Expectation(utilization, total, step_s, p50, p99)


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas of a machine a load needs.

    Attributes:
        for_throughput: so that none is busier than was asked for.
        for_latency: so that the first preview is in time; at least those of throughput.
        spare: beyond that.
        expected: of an instance, without the spare ones.
    """

    for_throughput: int
    for_latency: int
    spare: int
    expected: Expectation

    @property
    def count(self) -> int:
        """Replicas in all."""
        return self.for_latency + self.spare


def replicas(
    loads: Sequence[PlannedLoad],
    times: Mapping[str, ModelTimes],
    instances: int,
    max_utilization: float,
    first_preview_p99_s: float,
    spare: int,
) -> Replicas | None:
    """The replicas that a load needs on machines with so many instances; None: no number meets the target."""
    whole = expect(loads, times, 1.0).utilization
    enough = max(1, math.ceil(whole / (max_utilization * instances) - 1e-9))
    if enough > MAX_REPLICAS or expect(loads, times, 1e-9).first_preview_p99_s > first_preview_p99_s:
        return None

    def meets(count: int) -> bool:
        return expect(loads, times, 1 / (count * instances)).first_preview_p99_s <= first_preview_p99_s

    low, high = enough, enough
    while not meets(high):
        low, high = high + 1, high * 2
        if high > MAX_REPLICAS:
            return None
    while low < high:  # fewest between: more replicas are never slower
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return Replicas(enough, high, spare, expect(loads, times, 1 / (high * instances)))
