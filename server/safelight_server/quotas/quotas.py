"""Admits the requests of tenants within their quotas, and charges what they compute.

Each tenant has two token buckets: requests, and seconds of compute. A request
takes one token of the first and is admitted while the second is above zero. Its
compute is charged afterwards, and may leave a debt. With Redis the buckets are shared
by all replicas. While Redis cannot be reached each replica uses its own buckets, which
begin at the last known values and have the same limits; compute of that time is charged
when Redis is back, up to one burst for each replica.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence

from safelight_server.coordination.buckets import BucketDemand, LocalTokenBuckets, SharedTokenBuckets
from safelight_server.domain.errors import QuotaExceededError
from safelight_server.domain.quota import BucketView, QuotaView
from safelight_server.files import WatchedFile
from safelight_server.quotas.limits import QuotaLimits, TenantLimits
from safelight_server.storage.base import StoreError

REQUESTS, COMPUTE = "requests", "compute"
ABOVE_ZERO = 1e-6
"""Seconds of compute that must be left for a request to be admitted."""
CHARGE_EVERY_S = 0.25
"""How often compute is charged to the shared buckets, and so how late other replicas see it."""
MAX_CHARGES = 500
"""Tenants that one call of the script charges; it must be short, and Lua returns 8,000 values at most."""
UNLIMITED = QuotaLimits(TenantLimits(), {})


class Quotas:
    """The quotas of all tenants.

    Args:
        file: the limits of all tenants; None: there are no limits.
        shared: the buckets of all replicas; None: there is only this replica.
        private: turns a tenant's name into one that Redis may hold.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        file: WatchedFile[QuotaLimits] | None,
        shared: SharedTokenBuckets | None = None,
        private: Callable[[str], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._shared = shared
        self._private = private
        self._local = LocalTokenBuckets(clock)
        self._owed: defaultdict[str, float] = defaultdict(float)

    @property
    def works(self) -> list[Callable[[], Coroutine[None, None, None]]]:
        """Background work: reads the file again when it changes, and charges the shared buckets."""
        if self._file is None:
            return []
        return [self._file.follow] if self._shared is None else [self._file.follow, self._keep_charging]

    @property
    def tenants(self) -> list[str]:
        """The tenants with limits of their own."""
        return list(self._limits.tenants)

    @property
    def _limits(self) -> QuotaLimits:
        return UNLIMITED if self._file is None else self._file.content

    async def admit(self, tenant: str) -> None:
        """Counts a request of a tenant.

        Raises:
            QuotaExceededError: the tenant is beyond a limit; the request was not counted.
        """
        demands = self._demands(tenant, cost=1.0)
        if not demands:
            return
        enough, tokens = await self._spend(list(demands.values()))
        if not enough:
            raise _refusal(tenant, demands, tokens)

    def charge(self, tenant: str, seconds: float) -> None:
        """Charges a tenant for compute, in seconds."""
        rate = self._limits.of(tenant).compute_s
        if rate is None:
            return
        self._local.spend([BucketDemand(self._bucket(COMPUTE, tenant), rate, cost=seconds)])
        if self._shared is not None:
            self._owed[tenant] += seconds

    async def views(self, tenants: Sequence[str]) -> list[QuotaView]:
        """The present quotas of tenants: those of Redis, or of this replica if Redis does not answer."""
        by_tenant = {tenant: self._demands(tenant, cost=0.0) for tenant in tenants}
        demands = [BucketDemand(one.bucket, one.rate) for found in by_tenant.values() for one in found.values()]
        _, tokens = await self._spend(demands) if demands else (True, [])
        held = {demand.bucket: left for demand, left in zip(demands, tokens, strict=True)}
        return [
            QuotaView(tenant, _view(found.get(REQUESTS), held), _view(found.get(COMPUTE), held))
            for tenant, found in by_tenant.items()
        ]

    async def close(self) -> None:
        """Charges the compute that is not charged yet, if Redis can be reached."""
        await self._charge_shared()

    def _demands(self, tenant: str, cost: float) -> dict[str, BucketDemand]:
        """What a request of a tenant needs, by kind of bucket; empty if the tenant has no limit."""
        limits, found = self._limits.of(tenant), {}
        if limits.requests is not None:
            found[REQUESTS] = BucketDemand(self._bucket(REQUESTS, tenant), limits.requests, needed=1.0, cost=cost)
        if limits.compute_s is not None:
            found[COMPUTE] = BucketDemand(self._bucket(COMPUTE, tenant), limits.compute_s, needed=ABOVE_ZERO)
        return found

    def _bucket(self, kind: str, tenant: str) -> str:
        return f"{kind}:{self._private(tenant)}"

    async def _spend(self, demands: Sequence[BucketDemand]) -> tuple[bool, list[float]]:
        if self._shared is not None:
            try:
                enough, tokens = await self._shared.spend(demands)
            except StoreError:
                return self._local.spend(demands)
            self._local.put(demands, tokens)  # where the local buckets begin if Redis fails
            return enough, tokens
        return self._local.spend(demands)

    async def _keep_charging(self) -> None:
        while True:
            await asyncio.sleep(CHARGE_EVERY_S)
            await self._charge_shared()

    async def _charge_shared(self) -> None:
        """Charges the shared buckets for all compute since the last call. What fails is kept, up to one burst."""
        if self._shared is None:
            return
        owed, self._owed = self._owed, defaultdict(float)
        charges = list(self._charges(owed.items()))
        for first in range(0, len(charges), MAX_CHARGES):
            part = charges[first : first + MAX_CHARGES]
            try:
                await self._shared.spend([demand for _, demand in part])
            except StoreError:
                for tenant, demand in part:
                    self._owed[tenant] = min(demand.rate.burst, self._owed[tenant] + demand.cost)

    def _charges(self, owed: Iterable[tuple[str, float]]) -> Iterable[tuple[str, BucketDemand]]:
        for tenant, seconds in owed:
            if (rate := self._limits.of(tenant).compute_s) is not None:
                yield tenant, BucketDemand(self._bucket(COMPUTE, tenant), rate, cost=seconds)


def _view(demand: BucketDemand | None, held: dict[str, float]) -> BucketView | None:
    if demand is None:
        return None
    tokens, rate = held[demand.bucket], demand.rate
    return BucketView(
        rate.per_s, rate.burst, tokens, rate.wait_s(tokens, demand.needed), rate.wait_s(tokens, rate.burst)
    )


def _refusal(tenant: str, demands: dict[str, BucketDemand], tokens: Sequence[float]) -> QuotaExceededError:
    """The error of a refused request: names the limit with the longest wait, after which all limits allow it."""
    left = dict(zip(demands, tokens, strict=True))
    waits = {kind: demand.rate.wait_s(left[kind], demand.needed) for kind, demand in demands.items()}
    kind = max(waits, key=lambda one: waits[one])
    rate, subject = demands[kind].rate, f"tenant {tenant}"
    metadata = {"subject": subject, "limit_per_s": f"{rate.per_s:g}", "burst": f"{rate.burst:g}"}
    if kind == COMPUTE:
        return QuotaExceededError(
            f"{subject} has used its compute: {rate.per_s:g} s come back each second, up to {rate.burst:g} s; "
            f"it is {max(0.0, -left[kind]):.3g} s in debt",
            reason="COMPUTE_QUOTA_EXCEEDED",
            metadata=metadata | {"bound": "compute_s"},
            retry_after_s=waits[kind],
        )
    return QuotaExceededError(
        f"{subject} sends too many requests: {rate.per_s:g} a second are allowed, up to {rate.burst:g} at once",
        reason="REQUEST_RATE_EXCEEDED",
        metadata=metadata | {"bound": "requests"},
        retry_after_s=waits[kind],
    )
