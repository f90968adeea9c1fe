"""When a preview is due and how it is made. Pure: no clock, no tensors."""

from __future__ import annotations

import math

from safelight_server.request import PreviewMethod, PreviewPolicy

BUSY = 0.75
"""Load above which AUTO takes the linear preview."""


class Cadence:
    """Which steps of one output a stream wants: the first, then every n-th, or no sooner than an interval."""

    def __init__(self, policy: PreviewPolicy) -> None:
        self._every = policy.every_n_steps
        self._interval_s = policy.min_interval_s
        self._last_s = -math.inf

    def due(self, step: int, now: float) -> bool:
        """Whether a preview of `step` (from 1) is wanted now."""
        if self._interval_s > 0:
            return now - self._last_s >= self._interval_s
        return step == 1 or step % self._every == 0

    def taken(self, now: float) -> None:
        """A preview was started."""
        self._last_s = now


class Budget:
    """Preview bytes per second: a bucket of one second that may go below zero by the last preview's size."""

    def __init__(self, bytes_per_second: int | None, now: float) -> None:
        self._rate = bytes_per_second
        self._tokens = float(bytes_per_second or 0)
        self._at = now

    def allows(self, now: float) -> bool:
        """Whether a preview may be made now."""
        if self._rate is None:
            return True
        self._tokens = min(float(self._rate), self._tokens + (now - self._at) * self._rate)
        self._at = now
        return self._tokens > 0

    def spend(self, num_bytes: int) -> None:
        """A preview of that size was made."""
        self._tokens -= num_bytes


def choose_method(wanted: PreviewMethod, load: float, has_preview_decoder: bool) -> PreviewMethod:
    """What AUTO means at a load of the instances: 0 idle, 1 all busy."""
    if wanted is not PreviewMethod.AUTO:
        return wanted
    if load > BUSY:
        return PreviewMethod.LINEAR
    return PreviewMethod.TINY_DECODER if has_preview_decoder else PreviewMethod.FULL_DECODER
