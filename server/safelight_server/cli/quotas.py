"""The table of `safelight quotas`."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from safelight import TenantQuota, TokenBucket


def quota_table(quotas: Iterable[TenantQuota]) -> Table:
    """A row for each limit of each tenant; a tenant without limits has one row."""
    table = Table("tenant", "quota", "per second", "burst", "used", "left", "next request", "full")
    for quota in quotas:
        limits = {"requests": quota.requests, "compute": quota.compute_seconds}
        given = {kind: bucket for kind, bucket in limits.items() if bucket.burst}  # an absent bucket is all zeros
        for kind, bucket in given.items():
            table.add_row(quota.tenant, kind, *_figures(bucket, " s" if kind == "compute" else ""))
        if not given:
            table.add_row(quota.tenant, "no limits")
    return table


def _figures(bucket: TokenBucket, unit: str) -> list[str]:
    amounts = [f"{amount:.4g}{unit}" for amount in (bucket.per_second, bucket.burst, bucket.used, bucket.left)]
    waits = [wait.ToNanoseconds() / 1e9 for wait in (bucket.available_after, bucket.full_after)]
    return amounts + [f"in {wait:.1f} s" if wait else "now" for wait in waits]
