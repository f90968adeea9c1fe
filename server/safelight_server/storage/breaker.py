"""Circuit breaker: a timeout on each call, and no calls for a while after several failures in a row.

    closed ── failures in a row ──► open ── after open_s ──► half-open: ONE trial call
       ▲                              ▲                            │
       └───────── it succeeds ────────┼────────────────────────────┤
                                      └──────── it fails ──────────┘

However many calls arrive, at most one of them waits for a service that hangs, every `open_s` seconds. The log gets a
line when the breaker opens and one when it closes. No maintained library does this: see
docs/decisions/0011-cache-stores.md.
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
    """State of a breaker; the metric shows these numbers."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Guards the calls to one service.

    Args:
        name: of the service, in logs and metrics.
        timeout_s: a call that takes longer counts as failed.
        max_failures: failures in a row that open the breaker.
        open_s: seconds without calls after the breaker has opened.
        on_state: called with each new state.
        on_failure: called for each call that failed.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        name: str,
        timeout_s: float,
        max_failures: int = 3,
        open_s: float = 2.0,
        on_state: Callable[[BreakerState], None] = lambda _state: None,
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.state = BreakerState.CLOSED
        self._timeout_s = timeout_s
        self._max_failures = max_failures
        self._open_s = open_s
        self._on_state = on_state
        self._on_failure = on_failure
        self._clock = clock
        self._failures = 0
        self._opened_at = 0.0
        on_state(self.state)

    async def call(self, work: Callable[[], Awaitable[T]], *, extra_s: float = 0.0) -> T:
        """Runs `work` and returns its result.

        Args:
            work: raises `StoreUnavailableError` if the service failed; any other error counts as an answer of a
                working service.
            extra_s: seconds added to the timeout, for calls that wait on purpose.

        Raises:
            StoreUnavailableError: the service failed or was too slow, or the breaker is open (`LeftAloneError`).
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
                self._become(BreakerState.OPEN)  # the caller was cancelled: the next call is the trial
            raise
        self._succeeded(probe)
        return result

    def _admit(self) -> bool:
        """Returns whether this call is the trial call of a half-open breaker.

        Raises:
            LeftAloneError: the breaker is open, or another trial call is under way.
        """
        if self.state is BreakerState.CLOSED:
            return False
        if self.state is BreakerState.HALF_OPEN or self._clock() - self._opened_at < self._open_s:
            raise LeftAloneError(f"{self.name} failed just now")
        self._become(BreakerState.HALF_OPEN)
        return True

    def _failed(self, probe: bool, why: str) -> None:
        self._failures += 1
        self._on_failure()
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
