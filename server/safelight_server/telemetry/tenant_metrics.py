"""Prometheus metrics by tenant, with a bounded number of tenants."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

MAX_TENANTS = 200
"""The first so many tenants have series of their own. All others share those of `OTHERS`."""
OTHERS = "(others)"


class TenantMetrics:
    """Counts of each tenant's ended generations, refused calls and compute."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._generations = Counter(
            "safelight_tenant_generations", "Generations that ended", ["tenant", "status"], registry=registry
        )
        self._refused = Counter(
            "safelight_tenant_refused", "Calls that were refused", ["tenant", "reason"], registry=registry
        )
        self._compute = Counter(
            "safelight_tenant_compute_seconds", "Compute as billed", ["tenant", "model"], registry=registry
        )
        self._known: set[str] = set()
        self._ended: dict[tuple[str, str], Counter] = {}
        self._computed: dict[tuple[str, str], Counter] = {}

    def ended(self, tenant: str, status: str) -> None:
        """Counts a generation that ended with this status."""
        at = self._label(tenant), status
        if (counter := self._ended.get(at)) is None:
            counter = self._ended[at] = self._generations.labels(*at)
        counter.inc()

    def refused(self, tenant: str, reason: str) -> None:
        """Counts a call that was refused."""
        self._refused.labels(self._label(tenant), reason).inc()

    def computed(self, tenant: str, model: str, seconds: float) -> None:
        """Adds compute that was made for a tenant."""
        at = self._label(tenant), model
        if (counter := self._computed.get(at)) is None:
            counter = self._computed[at] = self._compute.labels(*at)
        counter.inc(seconds)

    def _label(self, tenant: str) -> str:
        if tenant not in self._known:
            if len(self._known) >= MAX_TENANTS:
                return OTHERS
            self._known.add(tenant)
        return tenant
