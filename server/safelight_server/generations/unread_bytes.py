"""Bounds the memory of what is under way: pictures of unfinished or watched generations, those that they start from,
and messages that clients have not read yet.

Finished generations that nobody watches have a bound of their own (`finished.py`).
When the bound here is exceeded, the tenant that holds most (`tenant_shares.py`)
loses. Of its streams that still deliver ended generations, the one that has been
stalled for longest is ended first; its client can resume it. Then its oldest
suspended generation is cancelled. While neither helps, the tenant is refused new
generations and further streams. The only generation of a tenant loses nothing, so
that large pictures can always be delivered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import QueueFullError
from safelight_server.generations.generation import Generation
from safelight_server.generations.open_streams import OpenStreams
from safelight_server.generations.suspended import SuspendedGenerations
from safelight_server.generations.tenant_shares import TenantShares
from safelight_server.stream import Watcher

RETRY_S = 1.0
"""RetryInfo of a refusal. The time at which the tenant's clients will read is unknown."""


class UnreadBytes:
    """What unfinished and watched generations hold, and the messages that gRPC holds for clients that do not read.

    Args:
        max_bytes: bound on the sum, enforced at each `relieve`.
        end: ends a stream of this server with an error after which the client can resume it.
    """

    def __init__(
        self, max_bytes: int, streams: OpenStreams, suspended: SuspendedGenerations, end: Callable[[Watcher], None]
    ) -> None:
        self._max_bytes = max_bytes
        self._streams = streams
        self._suspended = suspended
        self._end = end
        self._refused: str | None = None

    def check(self, caller: Caller) -> None:
        """Refuses the tenant that holds most, while the bound is exceeded and nothing more can be ended.

        Raises:
            QueueFullError: the caller belongs to that tenant.
        """
        if caller.tenant == self._refused:
            subject, limit = f"tenant {caller.tenant}", str(self._max_bytes)
            raise QueueFullError(
                f"generations and unread streams of {subject} fill the memory for them; wait for some, or read them",
                reason="TOO_MANY_UNREAD_BYTES",
                metadata={"bound": "unread_bytes", "subject": subject, "limit": limit},
                retry_after_s=RETRY_S,
            )

    def relieve(self, live: Iterable[Generation], now: float) -> None:
        """Ends streams and suspended generations until the bound is kept, or nothing more can be ended.

        Args:
            live: the generations that have not ended.
            now: the time on the clock of the streams.
        """
        self._refused = None
        generations = {*live, *self._streams.watched()}
        messages = list(self._streams.messages())
        total = sum(generation.held_bytes for generation in generations) + sum(size for _, _, size in messages)
        if total <= self._max_bytes:
            return
        shares: TenantShares[Generation | Watcher] = TenantShares(self._max_bytes)
        for generation in generations:
            shares.add(generation.caller.tenant, generation, generation.held_bytes)
        for reader, watcher, size in messages:
            shares.add(reader, watcher, size)
        number = Counter(generation.caller.tenant for generation in generations)
        late, lost = self._streams.late(now), self._suspended.by_tenant()
        while (tenant := shares.loser()) is not None:
            if number[tenant] > 1 and late.get(tenant):
                watcher, generation = late[tenant].pop()
                self._end(watcher)
            elif number[tenant] > 1 and lost.get(tenant):
                generation = lost[tenant].pop(0)
                self._suspended.abandon(generation, "its tenant holds too many unread bytes")
            else:
                self._refused = tenant
                return
            if generation.ended and not generation.log.watchers and generation in shares.held(tenant):
                shares.remove(tenant, generation)
                number[tenant] -= 1
