"""One Unix time for all replicas: that of their Redis.

The clocks of machines differ, and may be set while a server runs. So whatever replicas write for each other (deadlines,
expiries, times of ends) is in the time of the Redis that they share. Each replica measures that time when it connects
and every few seconds, and adds the seconds of its own monotonic clock in between.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)

MAX_OFFSET_S = 1.0
"""Difference of this machine's clock from Redis' beyond which the log has a warning."""


class SharedClock:
    """The time of Redis in Unix seconds; before the first measurement, and without Redis, that of this machine.

    Args:
        wall: this machine's Unix seconds.
        monotonic: seconds that nobody sets.
        on_offset: called after each measurement with the seconds by which `wall` is ahead of Redis.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        on_offset: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._on_offset = on_offset
        self._ahead_s: float | None = None
        self._differs = False

    def now(self) -> float:
        """The time in Unix seconds."""
        return self._wall() if self._ahead_s is None else self._monotonic() + self._ahead_s

    async def measure(self, ask: Callable[[], Awaitable[float]]) -> None:
        """Sets the clock to the time that `ask` returns, in Unix seconds, unless the clock may already be right.

        The answer was made at an unknown moment of the call. So the clock is changed only if it is wrong for every such
        moment, which a slow call seldom shows. It is then set as if the answer was made halfway through the call.

        Raises:
            StoreError: as `ask` does.
        """
        sent_at = self._monotonic()
        answer = await ask()
        least, most = answer - self._monotonic(), answer - sent_at
        if self._ahead_s is None or not least <= self._ahead_s <= most:
            self._ahead_s = (least + most) / 2
        offset_s = self._wall() - self.now()
        self._on_offset(offset_s)
        differs = abs(offset_s) > MAX_OFFSET_S
        if differs and not self._differs:
            log.warning("this machine's clock differs from Redis'; replicas use Redis'", offset_s=round(offset_s, 3))
        elif self._differs and not differs:
            log.info("this machine's clock agrees with Redis' again", offset_s=round(offset_s, 3))
        self._differs = differs
