"""Deletes entries by tenant, model revision, generation or expiry from all tiers.

No index is needed: keys begin with the tenant's tag, and headers hold the tags of model revision and generation. A
purge by tenant deletes by key alone; the others read the header (48 bytes) of every entry under the prefix.

A purge clears this replica's own tiers and the shared tiers. Other replicas must be told to clear their own
(`cache.purges`). Entries that are stored during a purge may stay.
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
    """Tenant, model revision and generation that an entry belongs to, in the form that purges compare.

    Attributes:
        prefix: the beginning of its key: the tenant's or pool's tag and `/`, or the whole key.
        revision: tag of the model revision that computed it.
        generation: tag of the generation that computed it.
    """

    prefix: str
    revision: bytes
    generation: bytes


@dataclass(frozen=True, slots=True)
class PurgeScope:
    """What to purge: every entry that matches all given attributes.

    Attributes:
        prefix: of keys; `Keyring.tenant(...) + "/"` for a tenant.
        revision: `Keyring.tag("revision", ...)`.
        generation: `Keyring.tag("generation", ...)`.
        expired_at: only entries that expire until then (Unix seconds).
    """

    prefix: str = ""
    revision: bytes | None = None
    generation: bytes | None = None
    expired_at: float | None = None

    def covers(self, key: str, head: bytes) -> bool:
        """Whether to delete an entry, given its key and its first `HEADER_BYTES`.

        A value without a valid header can never be served, so it is deleted.
        """
        header = parse_header(head)
        if header is None:
            return key.startswith(self.prefix)
        expired = self.expired_at is None or header.expires_at <= self.expired_at
        return expired and self.includes(EntryOwner(key, header.revision, header.generation))

    def includes(self, owner: EntryOwner) -> bool:
        """Whether to delete the entries of this owner; ignores expiry."""
        return (
            owner.prefix.startswith(self.prefix)
            and self.revision in (None, owner.revision)
            and self.generation in (None, owner.generation)
        )

    @property
    def by_name(self) -> bool:
        """Whether the key alone decides, so that no header has to be read."""
        return self.revision is None and self.generation is None and self.expired_at is None


@dataclass(slots=True)
class PurgeReport:
    """Number of entries deleted per tier, and the tiers that failed. Purge again when those work."""

    deleted: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


async def purge(tiers: Tiers, scope: PurgeScope, only: str | None = None) -> PurgeReport:
    """Deletes the entries that `scope` covers, from all tiers or from the tier named `only`."""
    report = PurgeReport()
    # Fastest tier first, so that nothing is evicted downwards past the purge; nothing moves up meanwhile.
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
