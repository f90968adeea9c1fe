"""How many replicas a load needs, from measured times of calls. Pure arithmetic; `plan.py` reads files and prints.

All outputs that an instance develops share its calls, so more outputs make each call longer and none wait for others.
With N outputs present each step takes t(N x rows), an output stays for S such steps, and by Little's law N = rate x S x
t(N x rows). The instance is stable while fewer rows arrive in a second than it can make in its best batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Z99 = 2.326
"""The 99th percentile of the standard normal distribution."""
MAX_REPLICAS = 100_000
ROUNDS = 10_000
"""Iterations towards the number of outputs present; if they do not converge the load counts as too high."""


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Measured seconds of a call by its rows. `rows` is sorted and begins with 1."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def max_rows(self) -> int:
        """Rows of the largest measured call; no larger call is made."""
        return self.rows[-1]

    @property
    def rows_per_s(self) -> float:
        """Rows that one instance can make in a second, at the best batch size."""
        return max(rows / seconds for rows, seconds in zip(self.rows, self.seconds, strict=True))

    def at(self, rows: float) -> float:
        """Seconds for `rows` rows, interpolated; more than `max_rows` take several calls."""
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
        denoiser: seconds of denoiser calls by rows.
        encode_s: seconds of a text encoder call of one row.
        decode_s: seconds of a decoder call of one row.
    """

    denoiser: CallTimes
    encode_s: float
    decode_s: float

    @property
    def other_s(self) -> float:
        """Seconds of a picture without its steps, in calls of one row."""
        return self.encode_s + self.decode_s


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """One kind of request.

    Attributes:
        images_per_s: pictures that are developed each second, without those that caches serve.
        rows_per_step: 2 with guidance, 1 without; with a guidance interval the mean over the steps.
        step_cost: cost of a step, as a multiple of that at the measured size.
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
    """The expected state of one instance under its part of the load.

    Attributes:
        utilization: share of its capacity that is used.
        outputs: mean number of outputs that it develops at once; infinite if it cannot keep up.
        first_preview_p50_s, first_preview_p99_s: from acceptance to the end of the first step's call.
    """

    utilization: float
    outputs: float
    step_s: float
    first_preview_p50_s: float
    first_preview_p99_s: float


def expect(loads: Sequence[PlannedLoad], times: Mapping[str, ModelTimes], part: float) -> Expectation:
    """The expected state of an instance that gets the share `part` (0 to 1) of all loads."""
    other = sum(load.images_per_s * times[load.model].other_s for load in loads) * part
    steps = sum(load.rows_per_s * load.step_cost / times[load.model].denoiser.rows_per_s for load in loads) * part
    utilization = other + steps
    if utilization >= 1.0:
        return Expectation(utilization, math.inf, math.inf, math.inf, math.inf)
    left = 1.0 - other  # of each second, for steps

    def round_s(outputs: Mapping[int, float]) -> float:
        """Seconds of one step of all outputs: a call of each model that has any."""
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
        for_throughput: replicas needed so that none exceeds `max_utilization`.
        for_latency: replicas needed so that the first preview is in time; at least `for_throughput`.
        spare: replicas beyond that.
        expected: expected state of an instance without the spare replicas.
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
    """The replicas that a load needs on machines with `instances` instances; None: no number meets the target."""
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
    while low < high:  # binary search: more replicas are never slower
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return Replicas(enough, high, spare, expect(loads, times, 1 / (high * instances)))
