"""Statistics and purge reports of the caches as protobuf messages."""

from __future__ import annotations

from safelight.v1 import cache_pb2 as pb

from safelight_server.cache.admin import CacheStats
from safelight_server.storage.purge import PurgeReport
from safelight_server.wire.times import duration


def stats_message(stats: CacheStats) -> pb.GetCacheStatsResponse:
    """The statistics of the caches as the answer to GetCacheStats."""
    return pb.GetCacheStatsResponse(
        hits=[
            pb.CacheHits(
                kind=hits.kind,
                num_outputs=hits.num_outputs,
                num_steps_saved=hits.num_steps,
                compute_saved=duration(hits.compute_s),
            )
            for hits in stats.hits
        ],
        tiers=[
            pb.CacheTier(name=tier.name, num_entries=tier.num_entries, num_bytes=tier.num_bytes) for tier in stats.tiers
        ],
        lookups=[
            pb.CacheLookups(
                kind=lookups.kind,
                num_lookups=lookups.seen.count,
                total=duration(lookups.seen.total),
                p50=duration(lookups.seen.quantile(0.5)),
                p99=duration(lookups.seen.quantile(0.99)),
            )
            for lookups in stats.lookups
        ],
        num_guard_rejections=stats.num_guard_rejections,
        num_not_kept=stats.num_not_kept,
    )


def purged_message(purged: PurgeReport) -> pb.PurgeCacheResponse:
    """The report of a purge as the answer to PurgeCache."""
    return pb.PurgeCacheResponse(
        tiers=[pb.PurgedTier(name=name, num_entries=count) for name, count in purged.deleted.items()],
        failed_tiers=purged.failed,
    )
