"""When a preview is due, what it may cost and how it is made. Pure: no clock, no tensors.

`stream/previews.py` has a `Cadence` for each output and a `Budget` for each
stream; `frames.py` calls `choose_method`.
"""

from __future__ import annotations

import math

from safelight_server.domain.request import PreviewMethod, PreviewPolicy

BUSY = 0.7
"""Load of the instances above which AUTO takes the linear preview."""
IDLE = 0.5
"""Load up to which AUTO may use the full decoder, for a pipeline without a preview decoder."""


class Cadence:
    """Which steps of one output are due on a stream: the first and every n-th, or the next one after an interval."""

    def __init__(self, policy: PreviewPolicy) -> None:
        self._every = policy.every_n_steps
        self._interval_s = policy.min_interval_s
        self._last_s = -math.inf

    def due(self, step: int, now: float, *, busy: bool) -> bool:
        """Whether a preview of `step` (from 1) is due.

        Args:
            busy: whether a preview is being made or waits to be sent: the interval begins when that is sent.
        """
        if self._interval_s > 0:
            return not busy and now - self._last_s >= self._interval_s
        return step == 1 or step % self._every == 0

    def next_due(self, step: int) -> int:
        """The first step after `step` that may be due; with an interval, which depends on the time, the next step."""
        if self._interval_s > 0:
            return step + 1
        return step + self._every - step % self._every if step else 1

    def sent(self, now: float) -> None:
        """Notes that a preview was sent."""
        self._last_s = now


class Budget:
    """Preview bytes per second: a token bucket of one second, in debt by at most about one preview.

    The size of a preview is known only after it was made. Until then the size of the
    last preview is assumed, or the whole bucket for the first.
    """

    def __init__(self, bytes_per_second: int | None, now: float) -> None:
        self._rate = bytes_per_second
        self._tokens = float(bytes_per_second or 0)
        self._at = now
        self._num_held = 0
        self._typical = self._tokens

    def hold(self, now: float) -> bool:
        """Reserves tokens for a preview. False: it must not be made now. `settle` ends the reservation."""
        if self._rate is not None:
            self._tokens = min(float(self._rate), self._tokens + (now - self._at) * self._rate)
            self._at = now
            if self._tokens <= self._num_held * self._typical:
                return False
        self._num_held += 1
        return True

    def settle(self, num_bytes: int) -> None:
        """Ends a reservation: the preview was sent and had this size, or was not sent (0)."""
        self._num_held -= 1
        self._tokens -= num_bytes
        self._typical = float(num_bytes) or self._typical


def choose_method(wanted: PreviewMethod, load: float, has_preview_decoder: bool) -> PreviewMethod:
    """Replaces AUTO by a method, by the load of the instances: 0 idle, 1 all busy, more when work waits."""
    if wanted is not PreviewMethod.AUTO:
        return wanted
    if has_preview_decoder and load <= BUSY:
        return PreviewMethod.TINY_DECODER
    if not has_preview_decoder and load <= IDLE:
        return PreviewMethod.FULL_DECODER
    return PreviewMethod.LINEAR
