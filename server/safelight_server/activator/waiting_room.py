"""Gives each call a replica. While there is none, a call waits here, within bounds.

Invariant: a call that a replica has not begun to answer is tried on another one, once.
"""

from __future__ import annotations

import asyncio
import contextlib

from prometheus_client import CollectorRegistry, Gauge

from safelight_server.activator.replicas import ConnectedReplicas, Replica
from safelight_server.domain.errors import QueueFullError, UnavailableError

RETRY_S = 5.0
"""RetryInfo of a refusal."""


class WaitingRoom:
    """Holds calls until there is a replica.

    Args:
        max_held: calls that are held at once; more are refused.
        hold_s: seconds that a call is held.
        registry: gets the metric of held calls.
    """

    def __init__(
        self, replicas: ConnectedReplicas, *, max_held: int, hold_s: float, registry: CollectorRegistry
    ) -> None:
        self._replicas = replicas
        self._max_held = max_held
        self._hold_s = hold_s
        self._held: set[asyncio.Timeout] = set()
        self._draining = False
        gauge = Gauge("safelight_held_calls", "Calls that wait for the first replica of a fleet.", registry=registry)
        gauge.set_function(lambda: len(self._held))

    @property
    def num_held(self) -> int:
        """Calls that wait for a replica."""
        return len(self._held)

    async def replica(self) -> Replica:
        """A replica for a call; until there is one the call is held.

        Raises:
            QueueFullError: as many calls are held as may be.
            UnavailableError: there was none in time, or the activator ends.
        """
        return self._replicas.some() or await self._hold()

    async def another(self, failed: Replica, *, gone: bool) -> Replica | None:
        """A replica for a call that `failed` has not begun to answer.

        Args:
            gone: whether `failed` was lost or drains, and not only refused this call. Then it gets no more calls, and
                this one is held if there is no other.

        Returns:
            None: there is no other, and what `failed` says is the answer.

        Raises:
            QueueFullError, UnavailableError: as `replica` does.
        """
        if not gone:
            return self._replicas.some(but=failed)
        self._replicas.give_up(failed)
        return await self.replica()

    def drain(self) -> None:
        """Refuses the calls that are held, and those that would be."""
        self._draining = True
        for held in self._held:
            with contextlib.suppress(RuntimeError):  # its time is up just now
                held.reschedule(asyncio.get_running_loop().time())

    async def _hold(self) -> Replica:
        if len(self._held) >= self._max_held:
            raise QueueFullError(
                f"{self._max_held} calls wait for a replica to start, as many as may",
                reason="TOO_MANY_CALLS",
                retry_after_s=RETRY_S,
            )
        held = asyncio.timeout(0.0 if self._draining else self._hold_s)
        self._held.add(held)
        try:
            async with held:
                while True:
                    await self._replicas.wait()
                    if (found := self._replicas.some()) is not None:
                        return found
        except TimeoutError:
            if self._draining:
                raise UnavailableError("the server is draining; ask another", reason="DRAINING") from None
            raise UnavailableError(
                f"no replica has started within {self._hold_s:g} s",
                reason="RUNTIME_UNAVAILABLE",
                retry_after_s=RETRY_S,
            ) from None
        finally:
            self._held.discard(held)
