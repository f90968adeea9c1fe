"""Outages, in which no instance of the runtime is live: how long outputs wait, and when new work is refused.

Outputs wait, since their latents are in this process. An output with a deadline waits
until that; an output without one waits `wait_s`, counted from the beginning of the
outage or from its arrival. New requests are still accepted for `grace_s`, so that
clients do not notice the restart of a server. After that they are refused, and health
becomes NOT_SERVING. `engine.py` reports changes; `planner.py` and health check the state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from safelight_server.domain.errors import DeadlineExceededError, SafelightError, UnavailableError

RETRY_S = 1.0


def no_runtime() -> UnavailableError:
    """The error of outputs and requests for which no instance has become live in time."""
    return UnavailableError(
        "no instance is live to execute the model; try another server, or later",
        reason="RUNTIME_UNAVAILABLE",
        retry_after_s=RETRY_S,
    )


class Outage:
    """Whether an outage is on, since when, and the timer that ends outputs that have waited too long.

    Args:
        clock: monotonic seconds.
        end: ends an output, or the wait for an embedding, that has lasted long enough.
    """

    def __init__(
        self, clock: Callable[[], float], wait_s: float, grace_s: float, end: Callable[[int | str], None]
    ) -> None:
        self._clock = clock
        self._wait_s = wait_s
        self._grace_s = grace_s
        self._end = end
        self._since: float | None = None
        self._waiting_since: dict[int | str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_on(self) -> bool:
        """Whether no instance is live now."""
        return self._since is not None

    @property
    def beyond_grace(self) -> bool:
        """Whether no instance has been live for `grace_s`."""
        return self._since is not None and self._clock() - self._since >= self._grace_s

    def late(self) -> SafelightError:
        """The error of a generation whose deadline has passed: UNAVAILABLE in an outage, or DEADLINE_EXCEEDED."""
        return no_runtime() if self.is_on else DeadlineExceededError("the deadline passed")

    def check(self) -> None:
        """Refuses new work in an outage that is longer than `grace_s`.

        Raises:
            UnavailableError: it is.
        """
        if self.beyond_grace:
            raise no_runtime()

    def changed(self, num_live: int) -> None:
        """Updates the number of live instances. An outage begins when it is 0 and ends when it is above."""
        if num_live:
            self._since = None
        elif self._since is None:
            self._since = self._clock()
        self._set_timer()

    def wait_for(self, who: int | str) -> None:
        """Limits the wait of an output without a deadline, or of a call for an embedding (by the prompt's name)."""
        self._waiting_since.setdefault(who, self._clock())
        if self._since is not None:
            self._set_timer()

    def forget(self, who: int | str) -> None:
        """Ends `wait_for`: the output has ended or got a deadline, or the embedding is computed."""
        self._waiting_since.pop(who, None)

    def close(self) -> None:
        """Stops the timer."""
        self._waiting_since.clear()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._since is not None and self._waiting_since:
            at = max(self._since, min(self._waiting_since.values())) + self._wait_s
            wait_s = max(0.0, at - self._clock()) + 1e-3
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._ring)

    def _ring(self) -> None:
        now, since = self._clock(), self._since
        if since is not None:
            for who in [who for who, came in self._waiting_since.items() if max(since, came) + self._wait_s <= now]:
                self._end(who)
                self._waiting_since.pop(who, None)
        self._set_timer()
