"""Purges on all replicas, and the upkeep of the tiers.

A purge clears this replica's tiers and the shared ones at once, and is appended
to a stream that every replica follows from its beginning, so that one which was
away clears its own disk when it comes back. It may then clear newer entries too,
which costs computation only. A tier that cannot be cleared when another replica
asks is not read until it could be. Scopes have HMACs in them and nothing that tells names.
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
"""Where indexes are that could fail to forget."""
MEASURE_EVERY_S = 15.0
SWEEP_EVERY_S = 600.0
MAX_OWED = 64
"""Purges that a tier may owe; beyond, all that it has is deleted."""


class PurgeableIndex(Protocol):
    """What finds entries in another way than by their keys."""

    async def forget(self, scope: PurgeScope) -> bool:
        """Finds nothing any more that the scope covers; False where that is not certain."""


class Purges:
    """Of one replica; run `listen` and `keep_up` as tasks.

    Args:
        coordinator: tells the other replicas; None: there are none.
        indexes: of this replica, which a purge clears after the tiers.
    """

    def __init__(self, tiers: Tiers, coordinator: Coordinator | None, indexes: Sequence[PurgeableIndex] = ()) -> None:
        self._tiers = tiers
        self._coordinator = coordinator
        self._indexes = indexes
        self._origin = secrets.token_hex(8)
        self._owed: dict[str, set[PurgeScope]] = {}

    async def purge(self, scope: PurgeScope) -> PurgeReport:
        """Deletes what the scope covers here and in shared tiers, and tells the other replicas.

        Returns:
            What was deleted here. `failed` names the tiers that could not be cleared, and "replicas" where the
            others could not be told.
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
        """Clears this replica's own tiers whenever another one purges; ends only where there are no others."""
        if self._coordinator is None:
            return
        async for event in self._coordinator.follow(STREAM, leader=False):
            origin, scope = parse(event.data)
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
        """The tier could not be cleared: it is tried again."""
        if not tier.unpurged:
            log.warning("a tier could not be purged for another replica and is not read until it is", tier=tier.name)
        tier.unpurged = True
        owed = self._owed.setdefault(tier.name, set())
        owed.add(scope)
        if len(owed) > MAX_OWED:
            owed.clear()
            owed.add(PurgeScope())

    async def _catch_up(self) -> None:
        """Does the purges that tiers owe, as far as they can now."""
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
        """Measures the tiers, does purges that they owe and deletes what has expired on disk; never ends."""
        swept = time.monotonic()
        while True:
            await self._tiers.measure(lazy=False)
            await self._catch_up()
            if time.monotonic() - swept >= SWEEP_EVERY_S:
                swept = time.monotonic()
                await purge(self._tiers, PurgeScope(expired_at=time.time()), only="disk")
                await self._tiers.measure(lazy=True)
            await asyncio.sleep(MEASURE_EVERY_S)


def dump(origin: str, scope: PurgeScope) -> bytes:
    """A purge as the stream has it."""
    tags = {name: tag.hex() for name, tag in (("revision", scope.revision), ("generation", scope.generation)) if tag}
    return json.dumps({"origin": origin, "prefix": scope.prefix} | tags).encode()


def parse(data: bytes) -> tuple[str, PurgeScope]:
    """Its origin and scope."""
    fields = json.loads(data)
    revision, generation = (
        bytes.fromhex(fields[name]) if name in fields else None for name in ("revision", "generation")
    )
    return fields["origin"], PurgeScope(fields["prefix"], revision, generation)
