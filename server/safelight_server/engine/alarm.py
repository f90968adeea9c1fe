"""Rings when a time has come that may change; it is set again only when it would ring too late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LATE_S = 1e-4
"""So that the time has passed when it rings, whatever the clocks' resolution."""


class Alarm:
    """One time at once.

    Args:
        ring: called when it has come; or earlier, when the time was moved back since: whoever hears it sets it again.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._timer: asyncio.Handle | None = None
        self._at = 0.0

    def set(self, in_s: float | None) -> None:
        """Rings in so many seconds at the latest; None: no need to."""
        if in_s is None:
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, in_s) + LATE_S
        if self._timer is not None:
            if self._at <= at:
                return
            self._timer.cancel()
        self._timer, self._at = loop.call_at(at, self._rings), at  # uvloop's handles do not always know when

    def stop(self) -> None:
        """Does not ring any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _rings(self) -> None:
        self._timer = None
        self._ring()
