"""Several storage tiers as one cache, fastest first. A tier that fails counts as a miss and shows in the metrics.

    put      writes memory at once and the other eager tiers in the background
    get      asks from the fastest tier down; copies what it finds to the faster tiers in the background
    evict    what memory or disk evict moves to the next slower tier that is not eager
    delete   deletes from the fastest tier down, in all tiers

A value is encrypted once and moves between tiers unchanged. A corrupt value is deleted from its tier and counted, and
slower tiers are read. Values that only memory holds are lost with the process. A caller that needs more passes
`replicate=True` to `put`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from safelight_server.storage.base import (
    HEADER_BYTES,
    LeftAloneError,
    Store,
    StoreError,
    StoreFullError,
    TooLargeError,
    listed,
)
from safelight_server.storage.breaker import Breaker, BreakerState
from safelight_server.storage.mover import Mover
from safelight_server.storage.sealed import CorruptError, Entry, Sealer, UnreadableError, parse_header
from safelight_server.telemetry.metrics import TierMetrics

log = structlog.get_logger(__name__)

T = TypeVar("T")
OFFLOAD_BYTES = 256 * 1024
"""Larger values are encrypted and decrypted in a thread: at about 1 GB/s, this size takes 0.25 ms of the event loop."""


@dataclass(slots=True)
class Tier:
    """One store and how it is used.

    Attributes:
        breaker: guards every call of the store; None for memory, which cannot hang.
        eager: written by every `put`; other tiers receive only what faster tiers evict.
        shared: other replicas read it, and it outlives this machine.
        full: the last write found no room; keeps the log to one line per change.
        unpurged: a purge of it failed, so it may hold deleted entries; it is not read until a purge succeeds.
    """

    store: Store
    breaker: Breaker | None = None
    eager: bool = True
    shared: bool = False
    full: bool = field(default=False, init=False)
    unpurged: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        """Name of the store."""
        return self.store.name


@dataclass(frozen=True, slots=True)
class TierHit:
    """A found entry, the name of its tier, and its expiry (Unix seconds)."""

    entry: Entry
    tier: str
    expires_at: float


class Tiers:
    """Reads from and writes to all tiers.

    Args:
        tiers: fastest first.
        max_waiting_bytes: of the values that wait to be written, per tier.
        now: clock in Unix seconds; None: that of the sealer.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        sealer: Sealer,
        metrics: TierMetrics,
        max_waiting_bytes: int = 64 << 20,
        now: Callable[[], float] | None = None,
    ) -> None:
        self.tiers = tuple(tiers)
        self._sealer = sealer
        self._metrics = metrics
        self.now = sealer.now if now is None else now
        self._deleting = 0
        self._deletions = 0
        self._movers = {
            tier.name: Mover(lambda key, value, tier=tier: self._write(tier, key, value), max_waiting_bytes)  # type: ignore[misc]
            for tier in self.tiers
        }
        for place, tier in enumerate(self.tiers):
            if hasattr(tier.store, "on_evict"):
                colder = next((other for other in self.tiers[place + 1 :] if not other.eager), None)
                tier.store.on_evict = None if colder is None else self._demote(tier, colder)

    async def get(self, key: str, fresh: bool = False, sure: bool = False) -> TierHit | None:
        """Finds an entry in the fastest tier that has it; None if no tier returns it.

        Args:
            fresh: ask the shared tiers first and copy nothing to faster tiers. For the few keys that other replicas
                overwrite.
            sure: raise rather than return None if a shared tier could not answer.

        Raises:
            StoreError: `sure` was set and a shared tier failed.
        """
        deletions = self._deletions
        places = list(enumerate(self.tiers))
        if fresh:
            places.sort(key=lambda place: not place[1].shared)
        for place, tier in places:
            if tier.unpurged:
                continue
            started = time.perf_counter()
            value = self._movers[tier.name].get(key)
            if value is None:
                asking = self.ask if sure and tier.shared else self.call
                value = await asking(tier, lambda tier=tier: tier.store.get(key))  # type: ignore[misc]
            found, outcome = (None, "miss") if value is None else await self._open(tier, key, value)
            self._metrics.got(tier.name, outcome, time.perf_counter() - started)
            if found is not None and value is not None:
                if deletions == self._deletions and not self._deleting and not fresh:
                    self._promote(place, key, value)
                return found
        return None

    async def gone(self, key: str) -> bool:
        """Whether every tier confirms that it lacks the key. False if a tier fails."""
        for tier in self.tiers:
            if self._movers[tier.name].get(key) is not None:
                return False
            try:
                head = await self.ask(tier, lambda tier=tier: tier.store.head(key))  # type: ignore[misc]
            except StoreError:
                return False
            if head is not None:
                return False
        return True

    async def put(self, key: str, entry: Entry, ttl_s: float, replicate: bool = False) -> bool:
        """Stores an entry.

        Args:
            ttl_s: seconds until the entry expires.
            replicate: wait until a shared tier has stored it.

        Returns:
            Whether a shared tier has stored it; without `replicate` always False.
        """
        value = await self._offload(len(entry.data), self._sealer.seal, key, entry, self.now() + ttl_s)
        replicated = False
        for place, tier in enumerate(self.tiers):
            mover = self._movers[tier.name]
            if replicate and tier.shared and not replicated:
                mover.discard(key)
                await mover.settle(key)
                replicated = await self._write(tier, key, value)
            elif tier.eager and place == 0:
                mover.discard(key)
                await mover.settle(key)
                await self._write(tier, key, value)
            elif tier.eager:
                self._offer(tier, key, value)
        return replicated

    async def delete(self, key: str) -> bool:
        """Deletes a key in every tier. False if a tier failed, which may then still serve it later."""
        with self.nothing_moves_up():
            return all([await self.erase(tier, key) for tier in self.tiers])

    @property
    def num_deletions(self) -> int:
        """Deletions and purges that have begun so far."""
        return self._deletions

    def undisturbed(self, since: int) -> bool:
        """Whether nothing is being deleted, and nothing was since `num_deletions` had this value."""
        return not self._deleting and self._deletions == since

    @contextlib.contextmanager
    def nothing_moves_up(self) -> Iterator[None]:
        """Stops `get` from copying values to faster tiers while entries are deleted from the fastest tier down.

        This also covers lookups that began before the deletion.
        """
        self._deletions += 1
        self._deleting += 1
        try:
            yield
        finally:
            self._deleting -= 1

    def waiting(self, tier: Tier) -> list[tuple[str, bytes]]:
        """Lists the keys and values that wait to be written to a tier."""
        return list(self._movers[tier.name].items())

    async def erase(self, tier: Tier, key: str) -> bool:
        """Deletes a key in one tier and in its queue of writes. False if the tier failed."""
        mover = self._movers[tier.name]
        mover.discard(key)
        await mover.settle(key)

        async def deleted() -> bool:
            await tier.store.delete(key)
            return True

        return await self.call(tier, deleted) is not None

    async def keys(self, prefix: str, limit: int) -> list[str]:
        """Lists at most `limit` keys that begin with `prefix`, from all tiers that answer."""
        found: dict[str, None] = {}
        for tier in self.tiers:
            if tier.breaker is not None and tier.breaker.state is not BreakerState.CLOSED:
                continue
            try:
                async with contextlib.aclosing(listed(tier.store, prefix)) as keys:
                    async for key in keys:
                        found[key] = None
                        if len(found) >= limit:
                            break
            except StoreError:
                self._metrics.error(tier.name, "unavailable")
        return list(found)

    async def flush(self) -> None:
        """Waits until all queued writes are done or have failed."""
        for mover in self._movers.values():
            await mover.flush()

    async def measure(self, lazy: bool = True) -> None:
        """Updates the metrics of entries and bytes per tier.

        Args:
            lazy: also of tiers that are not eager, which are expensive to measure.
        """
        for tier in self.tiers:
            if not tier.eager and not lazy:
                continue
            usage = await self.call(tier, tier.store.usage)
            if usage is not None:
                self._metrics.holds(tier.name, usage.entries, usage.num_bytes)

    async def close(self) -> None:
        """Stops the background writes and closes the stores."""
        for mover in self._movers.values():
            await mover.close()
        for tier in self.tiers:
            await self.call(tier, tier.store.close)

    async def call(self, tier: Tier, work: Callable[[], Awaitable[T]]) -> T | None:
        """Runs `work` on a tier; None if it fails. Errors of tiers are counted and end here."""
        try:
            return await self.ask(tier, work)
        except StoreFullError as error:
            self._metrics.error(tier.name, "full")
            if not tier.full:
                log.warning("a tier of the cache is full; work goes on without it", tier=tier.name, why=str(error))
            tier.full = True
        except TooLargeError:
            self._metrics.error(tier.name, "too_large")
        except LeftAloneError:
            self._metrics.error(tier.name, "left_alone")
        except StoreError:
            self._metrics.error(tier.name, "unavailable")
        return None

    async def ask(self, tier: Tier, work: Callable[[], Awaitable[T]]) -> T:
        """Runs `work` on a tier under its breaker.

        Raises:
            StoreError: the tier failed.
        """
        return await (work() if tier.breaker is None else tier.breaker.call(work))

    async def _open(self, tier: Tier, key: str, value: bytes) -> tuple[TierHit | None, str]:
        try:
            entry, expires_at = await self._offload(len(value), self._sealer.open, key, value)
        except CorruptError:
            log.warning("an entry of the cache is corrupt and dropped", tier=tier.name, key=key)
            await self.erase(tier, key)
            return None, "corrupt"
        except UnreadableError:
            return None, "unreadable"
        if expires_at <= self.now():
            await self.erase(tier, key)
            return None, "expired"
        return TierHit(entry, tier.name, expires_at), "hit"

    async def _write(self, tier: Tier, key: str, value: bytes) -> bool:
        header = parse_header(value)
        ttl_s = 0.0 if header is None else header.expires_at - self.now()
        if ttl_s <= 0:
            return False

        async def written() -> bool:
            # A tier that is not eager gets evicted values, which may have been read from it before.
            if tier.eager or await tier.store.head(key) != value[:HEADER_BYTES]:
                await tier.store.put(key, value, ttl_s)
            return True

        done = await self.call(tier, written) is not None
        if done and tier.full:
            tier.full = False
            log.info("a tier of the cache has room again", tier=tier.name)
        return done

    def _promote(self, place: int, key: str, value: bytes) -> None:
        for tier in self.tiers[:place]:
            if tier.eager:
                self._offer(tier, key, value)

    def _demote(self, tier: Tier, colder: Tier) -> Callable[[str, bytes], None]:
        return lambda key, value: None if tier.unpurged else self._offer(colder, key, value)

    def _offer(self, tier: Tier, key: str, value: bytes) -> None:
        if not self._movers[tier.name].offer(key, value):
            self._metrics.dropped(tier.name)

    @staticmethod
    async def _offload(size: int, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.to_thread(work, *arguments) if size > OFFLOAD_BYTES else work(*arguments)
