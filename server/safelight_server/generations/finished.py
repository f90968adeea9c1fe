"""Keeps ended generations for a while, to be read and watched again; bounded in time, number and bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection

from safelight_server.generations.generation import Generation
from safelight_server.generations.tenant_shares import TenantShares


class FinishedGenerations:
    """Ended generations by id, bounded by shares of the tenants (`tenant_shares.py`).

    When a tenant holds too many generations or too many bytes, the generation goes first
    that no stream has watched for longest. Watched generations do not count in bytes:
    dropping them would free nothing, and `open_streams.py` bounds what streams hold.

    Args:
        ttl_s: how long a generation is kept after its end.
        max_entries: bound on their number.
        max_bytes: bound on the bytes of those that no stream watches.
        clock: monotonic seconds.
    """

    def __init__(self, ttl_s: float, max_entries: int, max_bytes: int, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._generations: OrderedDict[str, Generation] = OrderedDict()  # in the order in which they ended
        self._number: TenantShares[str] = TenantShares(max_entries)
        self._unwatched: TenantShares[str] = TenantShares(max_bytes)

    def __len__(self) -> int:
        return len(self._generations)

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._generations

    def values(self) -> Collection[Generation]:
        """All generations that are kept."""
        return self._generations.values()

    def get(self, identifier: str) -> Generation | None:
        """The generation with an id; None: it is not kept."""
        return self._generations.get(identifier)

    def add(self, generation: Generation) -> None:
        """Keeps a generation that has ended. A generation that is kept already keeps its position in the order."""
        if generation.identifier not in self._generations:
            self._generations[generation.identifier] = generation
            self._number.add(generation.caller.tenant, generation.identifier)
            self.unwatched(generation)
        self.trim()

    def watched(self, generation: Generation) -> None:
        """Notes that a stream watches the generation. Generations that are not kept are ignored."""
        self._unwatched.remove(generation.caller.tenant, generation.identifier)

    def unwatched(self, generation: Generation) -> None:
        """Notes that a stream of the generation has ended. Ignored if it has other streams or is not kept."""
        if self._generations.get(generation.identifier) is generation and not generation.log.watchers:
            self._unwatched.add(generation.caller.tenant, generation.identifier, generation.held_bytes)

    def remove(self, generation: Generation) -> None:
        """Drops a generation whose outcome another replica decides."""
        if self._generations.get(generation.identifier) is generation:
            self._drop(generation)

    def trim(self) -> None:
        """Drops generations older than `ttl_s`; then, while a bound is exceeded, some of the tenant that holds most."""
        now = self._clock()
        while self._generations:
            oldest = next(iter(self._generations.values()))
            assert oldest.times.ended is not None
            if now - oldest.times.ended <= self._ttl_s:
                break
            self._drop(oldest)
        while (tenant := self._number.loser()) is not None:
            unwatched = self._unwatched.held(tenant)
            self._drop(self._generations[next(iter(unwatched or self._number.held(tenant)))])
        while (tenant := self._unwatched.loser()) is not None:
            self._drop(self._generations[next(iter(self._unwatched.held(tenant)))])

    def _drop(self, generation: Generation) -> None:
        del self._generations[generation.identifier]
        self._number.remove(generation.caller.tenant, generation.identifier)
        self._unwatched.remove(generation.caller.tenant, generation.identifier)
