"""Bounds what a failing service costs: a timeout on each call, and after several failures none for a while.

    closed ── failures in a row ──► open ── after open_s ──► half-open: ONE call tries
       ▲                              ▲                            │
       └───────── it succeeds ────────┼────────────────────────────┤
                                      └──────── it fails ──────────┘

However many calls come, a service that hangs is waited for by at most one of
them every `open_s`. The log has a line when it opens and one when it closes.
No kept library does this: see docs/decisions/0011-cache-stores.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import TypeVar

import structlog

from safelight_server.storage.base import LeftAloneError, StoreError, StoreUnavailableError

log = structlog.get_logger(__name__)

T = TypeVar("T")


class BreakerState(IntEnum):
    """Of a breaker; the numbers are what the metric shows."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Around one service.

    Args:
        name: the service in logs and metrics.
        timeout_s: a call that takes longer has failed.
        max_failures: failures in a row that open it.
        open_s: how long the service is left alone.
        on_state: told each new state.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        timeout_s: float,
        max_failures: int = 3,
        open_s: float = 2.0,
        on_state: Callable[[BreakerState], None] = lambda _state: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.state = BreakerState.CLOSED
        self._timeout_s = timeout_s
        self._max_failures = max_failures
        self._open_s = open_s
        self._on_state = on_state
        self._clock = clock
        self._failures = 0
        self._opened_at = 0.0
        on_state(self.state)

    async def call(self, work: Callable[[], Awaitable[T]], *, extra_s: float = 0.0) -> T:
        """The result of `work`.

        Args:
            work: raises `StoreUnavailableError` where the service is to blame; other errors are answers of a
                service that works.
            extra_s: time the call may take beyond the timeout, for calls that wait on purpose.

        Raises:
            StoreUnavailableError: the service failed, was too slow, or is left alone (`LeftAloneError`).
        """
        probe = self._admit()
        try:
            async with asyncio.timeout(self._timeout_s + extra_s):
                result = await work()
        except TimeoutError:
            self._failed(probe, f"no answer in {self._timeout_s + extra_s:g} s")
            raise StoreUnavailableError(f"{self.name}: no answer in time") from None
        except StoreUnavailableError as error:
            self._failed(probe, str(error))
            raise
        except StoreError:
            self._succeeded(probe)
            raise
        except BaseException:
            if probe:
                self._become(BreakerState.OPEN)  # the caller went away: the next one tries
            raise
        self._succeeded(probe)
        return result

    def _admit(self) -> bool:
        """Whether this call is the one that tries."""
        if self.state is BreakerState.CLOSED:
            return False
        if self.state is BreakerState.HALF_OPEN or self._clock() - self._opened_at < self._open_s:
            raise LeftAloneError(f"{self.name} failed just now")
        self._become(BreakerState.HALF_OPEN)
        return True

    def _failed(self, probe: bool, why: str) -> None:
        self._failures += 1
        if probe:
            self._open()
        elif self.state is BreakerState.CLOSED and self._failures >= self._max_failures:
            log.warning("service fails and is left alone; work goes on without it", service=self.name, why=why)
            self._open()

    def _succeeded(self, probe: bool) -> None:
        if probe:
            log.info("service works again", service=self.name)
            self._become(BreakerState.CLOSED)
        if self.state is BreakerState.CLOSED:
            self._failures = 0

    def _open(self) -> None:
        self._opened_at = self._clock()
        self._become(BreakerState.OPEN)

    def _become(self, state: BreakerState) -> None:
        self.state = state
        self._on_state(state)
