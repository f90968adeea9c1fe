"""Purges on all replicas, and periodic maintenance of the tiers.

A purge clears this replica's tiers and the shared tiers at once. It is also appended to a stream that every replica
reads from the beginning, so that a replica that was down clears its own disk when it comes back. That may delete newer
entries too, which only costs computation. If a tier cannot be cleared for another replica's purge, it is not read until
it has been cleared. The stream holds HMACs, never names.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from typing import Protocol

import structlog

from safelight_server.coordination.base import Coordinator
from safelight_server.storage.base import StoreError
from safelight_server.storage.purge import PurgeReport, PurgeScope, purge
from safelight_server.storage.tiers import Tier, Tiers

log = structlog.get_logger(__name__)

STREAM = "purges"
REDIS = "redis"
"""Name reported in `PurgeReport.failed` if an index failed: only the indexes in Redis can."""
MEASURE_EVERY_S = 15.0
SWEEP_EVERY_S = 600.0
MAX_OWED = 64
"""Most failed purges that are remembered per tier; with more, the whole tier is cleared instead."""


class PurgeableIndex(Protocol):
    """An index that purges must clear beside the tiers."""

    async def forget(self, scope: PurgeScope) -> bool:
        """Removes everything that the scope covers. False if that may have failed."""


class Purges:
    """Purges and maintains one replica's tiers. Run `listen` and `keep_up` as tasks.

    Args:
        coordinator: carries purges to the other replicas; None: there are none.
        indexes: of this replica; a purge clears them after the tiers.
    """

    def __init__(self, tiers: Tiers, coordinator: Coordinator | None, indexes: Sequence[PurgeableIndex] = ()) -> None:
        self._tiers = tiers
        self._coordinator = coordinator
        self._indexes = indexes
        self._origin = secrets.token_hex(8)
        self._owed: dict[str, set[PurgeScope]] = {}

    async def purge(self, scope: PurgeScope) -> PurgeReport:
        """Deletes what the scope covers from this replica's and the shared tiers, and notifies the other replicas.

        Returns:
            Number of entries deleted here. `failed` names the tiers that could not be cleared, and "replicas" if the
            other replicas could not be notified.
        """
        report = await purge(self._tiers, scope)
        if not await self._forget(scope) and REDIS not in report.failed:
            report.failed.append(REDIS)
        if self._coordinator is None:
            return report
        try:
            await self._coordinator.append(STREAM, dump(self._origin, scope))
        except StoreError:
            report.failed.append("replicas")
        return report

    async def listen(self) -> None:
        """Clears this replica's own tiers whenever another replica purges. Ends at once without a coordinator."""
        if self._coordinator is None:
            return
        async for event in self._coordinator.follow(STREAM, leader=False):
            try:
                origin, scope = parse(event.data)
            except (KeyError, TypeError, ValueError):
                log.warning("a purge of another replica cannot be read", place=event.place)
                continue
            if origin == self._origin:
                continue
            for tier in self._tiers.tiers:
                if not tier.shared:
                    report = await purge(self._tiers, scope, only=tier.name)
                    if report.failed:
                        self._owe(tier, scope)
                    else:
                        log.info("purged for another replica", deleted=report.deleted)
            await self._forget(scope)

    def _owe(self, tier: Tier, scope: PurgeScope) -> None:
        """Records a failed purge of a tier, to be tried again, and stops reads of the tier."""
        if not tier.unpurged:
            log.warning("a tier could not be purged for another replica and is not read until it is", tier=tier.name)
        tier.unpurged = True
        owed = self._owed.setdefault(tier.name, set())
        owed.add(scope)
        if len(owed) > MAX_OWED:
            owed.clear()
            owed.add(PurgeScope())

    async def _catch_up(self) -> None:
        """Retries the failed purges of all tiers."""
        for tier in self._tiers.tiers:
            owed = self._owed.get(tier.name, set())
            while owed:
                scope = owed.pop()
                if (await purge(self._tiers, scope, only=tier.name)).failed:
                    self._owe(tier, scope)
                    break
            if tier.unpurged and not owed:
                tier.unpurged = False
                log.info("a tier that could not be purged is now, and is read again", tier=tier.name)

    async def _forget(self, scope: PurgeScope) -> bool:
        return all([await index.forget(scope) for index in self._indexes])

    async def keep_up(self) -> None:
        """Measures the tiers, retries failed purges and deletes expired entries from disk, periodically for ever."""
        swept = time.monotonic()
        while True:
            await self._tiers.measure(lazy=False)
            await self._catch_up()
            if time.monotonic() - swept >= SWEEP_EVERY_S:
                swept = time.monotonic()
                await purge(self._tiers, PurgeScope(expired_at=self._tiers.now()), only="disk")
                await self._tiers.measure(lazy=True)
            await asyncio.sleep(MEASURE_EVERY_S)


def dump(origin: str, scope: PurgeScope) -> bytes:
    """Encodes a purge for the stream."""
    tags = {name: tag.hex() for name, tag in (("revision", scope.revision), ("generation", scope.generation)) if tag}
    return json.dumps({"origin": origin, "prefix": scope.prefix} | tags).encode()


def parse(data: bytes) -> tuple[str, PurgeScope]:
    """Decodes a purge from the stream: the replica that began it, and its scope."""
    fields = json.loads(data)
    revision, generation = (
        bytes.fromhex(fields[name]) if name in fields else None for name in ("revision", "generation")
    )
    return fields["origin"], PurgeScope(fields["prefix"], revision, generation)
