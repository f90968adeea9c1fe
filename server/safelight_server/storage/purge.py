"""Deletes what belongs to a tenant, was computed with a model revision or by a generation; and what has expired.

Keys begin with the tenant's tag and headers have the tags of revision and
generation, so that no index has to be kept: a purge by tenant deletes by name,
the others read the headers (48 bytes) of what they look through. Hot tiers come
first, so that nothing moves down past the purge; nothing moves up meanwhile.

It clears this replica's own tiers and the shared ones; other replicas must be
told to clear their own (`Coordinator.append`). Values that are put meanwhile
may stay.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from safelight_server.storage.base import StoreUnavailableError, listed
from safelight_server.storage.sealed import parse_header
from safelight_server.storage.tiers import Tier, Tiers

BATCH = 16


@dataclass(frozen=True, slots=True)
class EntryOwner:
    """Whose something is, as a purge asks.

    Attributes:
        prefix: of its keys.
        revision: tag of the model revision that computed it.
        generation: tag of the generation that computed it.
    """

    prefix: str
    revision: bytes
    generation: bytes


@dataclass(frozen=True, slots=True)
class PurgeScope:
    """What to purge: everything that agrees with all that is given.

    Attributes:
        prefix: of keys; `Keyring.tenant(...) + "/"` for a tenant.
        revision: `Keyring.tag("revision", ...)`.
        generation: `Keyring.tag("generation", ...)`.
        expired_at: only what expires until then (Unix seconds).
    """

    prefix: str = ""
    revision: bytes | None = None
    generation: bytes | None = None
    expired_at: float | None = None

    def covers(self, key: str, head: bytes) -> bool:
        """Whether a value is to go. One without a header is nothing that could ever be served: it goes."""
        header = parse_header(head)
        if header is None:
            return key.startswith(self.prefix)
        expired = self.expired_at is None or header.expires_at <= self.expired_at
        return expired and self.includes(EntryOwner(key, header.revision, header.generation))

    def includes(self, owner: EntryOwner) -> bool:
        """Whether what is this owner's is to go, whenever it expires."""
        return (
            owner.prefix.startswith(self.prefix)
            and self.revision in (None, owner.revision)
            and self.generation in (None, owner.generation)
        )

    @property
    def by_name(self) -> bool:
        """Whether the key alone decides."""
        return self.revision is None and self.generation is None and self.expired_at is None


@dataclass(slots=True)
class PurgeReport:
    """Entries deleted by tier, and the tiers that could not be cleared: purge again when they work."""

    deleted: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


async def purge(tiers: Tiers, scope: PurgeScope, only: str | None = None) -> PurgeReport:
    """Deletes what `scope` covers, from all tiers or from `only` one."""
    report = PurgeReport()
    with tiers.nothing_moves_up():
        for tier in tiers.tiers:
            if only not in (None, tier.name):
                continue
            try:
                report.deleted[tier.name] = await _purge_tier(tiers, tier, scope)
            except StoreUnavailableError:
                report.failed.append(tier.name)
    return report


async def _purge_tier(tiers: Tiers, tier: Tier, scope: PurgeScope) -> int:
    deleted = 0
    for key, value in tiers.waiting(tier):
        if scope.covers(key, value):
            deleted += await _erase(tiers, tier, key)
    batch: list[str] = []
    async for key in listed(tier.store, scope.prefix):
        batch.append(key)
        if len(batch) == BATCH:
            deleted += sum(await asyncio.gather(*(_look(tiers, tier, scope, key) for key in batch)))
            batch = []
    return deleted + sum(await asyncio.gather(*(_look(tiers, tier, scope, key) for key in batch)))


async def _look(tiers: Tiers, tier: Tier, scope: PurgeScope, key: str) -> bool:
    if not scope.by_name:
        head = await tiers.ask(tier, lambda: tier.store.head(key))
        if head is None or not scope.covers(key, head):
            return False
    return await _erase(tiers, tier, key)


async def _erase(tiers: Tiers, tier: Tier, key: str) -> bool:
    if not await tiers.erase(tier, key):
        raise StoreUnavailableError(tier.name)
    return True
