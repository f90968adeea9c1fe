"""The caches as administrators see them: what they hold and save, and deleting from them.

A purge clears the tiers first and what is found through vectors after, here and
on every other replica. Neighbours: `purges` does it, `namespaces` knows whose keys
are where, `service.py` asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from safelight_server.cache.namespaces import Namespaces
from safelight_server.cache.purges import Purges
from safelight_server.domain.request import PurgeRequest
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.purge import PurgeReport, PurgeScope
from safelight_server.storage.tiers import Tiers
from safelight_server.telemetry.metrics import Hits, Lookups, Metrics, TierUsage

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What this replica's caches have done since it was started."""

    hits: Sequence[Hits]
    tiers: Sequence[TierUsage]
    lookups: Sequence[Lookups]
    num_guard_rejections: int
    num_not_kept: int


class CacheAdmin:
    """Reports what the caches hold and save, and purges entries from them, for administrators."""

    def __init__(
        self, namespaces: Namespaces, keyring: Keyring, tiers: Tiers, purges: Purges, metrics: Metrics
    ) -> None:
        self._namespaces = namespaces
        self._keyring = keyring
        self._tiers = tiers
        self._purges = purges
        self._metrics = metrics

    async def stats(self) -> CacheStats:
        """The figures; tiers that are cheap to ask are measured now."""
        await self._tiers.measure(lazy=False)
        cache = self._metrics.cache
        names = [tier.name for tier in self._tiers.tiers]
        return CacheStats(
            cache.hits(), self._metrics.tiers.usage(names), cache.lookups(), cache.num_rejected, cache.num_not_kept
        )

    async def purge(self, request: PurgeRequest) -> PurgeReport:
        """Deletes what agrees with all that is given.

        Returns:
            Entries deleted by tier, and the tiers that could not be cleared.
        """
        keyring, whole = self._keyring, PurgeReport()
        revision = keyring.tag("revision", request.model_revision) if request.model_revision else None
        generation = keyring.tag("generation", request.generation) if request.generation else None
        prefixes = self._namespaces.prefixes(request.tenant) if request.tenant else [""]
        for prefix in prefixes:
            part = await self._purges.purge(PurgeScope(prefix, revision, generation))
            for name, count in part.deleted.items():
                whole.deleted[name] = whole.deleted.get(name, 0) + count
            whole.failed += [name for name in part.failed if name not in whole.failed]
        log.info("purged", deleted=whole.deleted, failed=whole.failed)
        return whole
