"""All Prometheus metrics of the server, in a registry of their own.

Labels are resolved once, in constructors, so that hot paths only add numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from safelight_server.telemetry.figures import Distribution, by_label, distributions, value
from safelight_server.telemetry.quality_metrics import QualityMetrics
from safelight_server.telemetry.tenant_metrics import TenantMetrics

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WAIT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
KINDS = ("encode", "denoise", "preview", "decode")
HITS = ("exact", "similar", "latent", "coalesced", "branched")
LOOKUPS = ("exact", "approximate")
DEGRADATIONS = ("fewer_steps", "cheaper_previews", "similar_picture")
CLASSES = ("interactive", "standard", "batch")
DUE_WITHIN_S = (5, 15, 60, 300)
"""Times to a deadline for which `safelight_due_compute_seconds` has a series each."""
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
STATUSES = ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE")
"""Statuses that have a series from the start, so that the first such end of a generation shows as an increase."""
REFUSALS = (
    *("QUEUE_FULL", "DEADLINE_UNREACHABLE", "REQUEST_RATE_EXCEEDED", "COMPUTE_QUOTA_EXCEEDED", "TOO_MANY_STREAMS"),
    *("TOO_MANY_UNREAD_BYTES", "RUNTIME_UNAVAILABLE", "DRAINING", "INTERNAL", "UNAUTHENTICATED", "INVALID_REQUEST"),
    *("TOKEN_EXPIRED", "TOKEN_INVALID", "TOKEN_NOT_ALLOWED", "TOKEN_KEY_UNKNOWN", "IDENTITY_PROVIDER_UNAVAILABLE"),
)
"""Reasons of refusals that have a series from the start."""
FAULTS = ("rows", "instance", "nobody")
"""Origins of failed calls (`runtime.base.FaultOrigin`) that have a series from the start."""
OUTCOMES = ("hit", "miss", "expired", "corrupt", "unreadable")
TIER_ERRORS = ("unavailable", "left_alone", "full", "too_large")
TIER_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)


@dataclass(frozen=True, slots=True)
class Hits:
    """Outputs that one kind of cache hit served, and what that saved: denoising steps and seconds of compute."""

    kind: str
    num_outputs: int
    num_steps: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class Lookups:
    """Distribution of the times, in seconds, of one kind of cache lookup."""

    kind: str
    seen: Distribution


@dataclass(frozen=True, slots=True)
class TierUsage:
    """Entries and bytes in a cache tier at its last measurement."""

    name: str
    num_entries: int
    num_bytes: int


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        rows = Histogram("safelight_batch_rows", "Rows of a runtime call", ["kind"], buckets=ROWS, registry=registry)
        calls = Histogram(
            "safelight_call_seconds", "Time of a runtime call", ["kind"], buckets=CALL_S, registry=registry
        )
        self._rows = {kind: rows.labels(kind) for kind in KINDS}
        self._calls = {kind: calls.labels(kind) for kind in KINDS}
        self._waiting = Gauge(
            "safelight_waiting_outputs", "Outputs that have not started", ["class"], registry=registry
        )
        self._compute_price = Gauge(
            "safelight_compute_price", "Price of a second of compute", ["currency"], registry=registry
        )
        self._machine_price = Gauge(
            "safelight_machine_price_per_hour", "Price of this machine", ["currency"], registry=registry
        )
        self._backlog = Gauge(
            "safelight_backlog_seconds", "Time that all instances need for all outputs accepted", registry=registry
        )
        self._left = Gauge(
            "safelight_left_compute_seconds",
            "Time of one instance, in full batches, for what is left of the outputs accepted",
            ["class"],
            registry=registry,
        )
        self._due = Gauge(
            "safelight_due_compute_seconds",
            "Time of one instance, in full batches, for what is left of outputs that are due within so many seconds",
            ["within"],
            registry=registry,
        )
        self._requested = Counter(
            "safelight_requested_compute_seconds",
            "Time of one instance, in full batches, for requested outputs that no cache has, refused or not",
            ["class"],
            registry=registry,
        )
        self._degradations = Counter(
            "safelight_degradations",
            "Requests that gave something up under load, as their quality floors allowed",
            ["kind", "class"],
            registry=registry,
        )
        self._pressure = Gauge(
            "safelight_class_late",
            "1 while more is queued for a class than is done in the time that it may wait",
            ["class"],
            registry=registry,
        )
        self._live = Gauge("safelight_live_instances", "Instances that take calls", registry=registry)
        self._instances = Gauge("safelight_instances", "Instances when all are live", registry=registry)
        self._streams = Gauge("safelight_open_streams", "Open streams of generations", registry=registry)
        self._failed_calls = Counter(
            "safelight_failed_calls", "Calls of the runtime that failed", ["kind", "fault"], registry=registry
        )
        self._running = Gauge("safelight_running_outputs", "Outputs that take steps", registry=registry)
        self._parked = Gauge("safelight_parked_outputs", "Outputs whose slots others have", registry=registry)
        self._outcomes = Counter("safelight_generations", "Generations that ended", ["status"], registry=registry)
        self._refused = Counter("safelight_refused", "Requests that were refused", ["reason"], registry=registry)
        self._http_requests = Counter(
            "safelight_http_requests", "HTTP requests that were answered", ["route", "status"], registry=registry
        )
        self._first_preview = Histogram(
            "safelight_first_preview_seconds",
            "Acceptance to first preview",
            ["class"],
            buckets=WAIT_S,
            registry=registry,
        )
        self._duration = Histogram(
            "safelight_generation_seconds", "Acceptance to the end", ["class"], buckets=WAIT_S, registry=registry
        )
        self.previews_sent = Counter("safelight_previews_sent", "Previews handed to streams", registry=registry)
        self.preview_bytes = Counter("safelight_preview_bytes", "Bytes of these previews", registry=registry)
        self.previews_dropped = Counter("safelight_previews_dropped", "Previews passed over", registry=registry)
        self.compute_seconds = Counter("safelight_compute_seconds", "Time of runtime calls", registry=registry)
        self.critical_seconds = Counter(
            "safelight_critical_path_seconds", "Time between a call's return and the next dispatch", registry=registry
        )
        self.sampler_seconds = Counter("safelight_sampler_seconds", "Time of sampler steps", registry=registry)
        self.tiers = TierMetrics(registry)
        self.cache = CacheMetrics(registry)
        self.tenants = TenantMetrics(registry)
        self.quality = QualityMetrics(registry)
        self.loop_lag = Histogram(
            "safelight_loop_lag_seconds",
            "How late the event loop runs its ticks, of which there are four a second",
            buckets=LAG_S,
            registry=registry,
        )
        self._ended = {status: self._outcomes.labels(status) for status in STATUSES}
        for reason in REFUSALS:
            self._refused.labels(reason)
        for name in CLASSES:
            self._requested.labels(name)
            self._pressure.labels(name)
            if name != "interactive":  # never degraded
                for kind in DEGRADATIONS:
                    self._degradations.labels(kind, name)
            self._first_preview.labels(name)
        self._durations = {name: self._duration.labels(name) for name in CLASSES}
        for kind in KINDS:
            for fault in FAULTS:
                self._failed_calls.labels(kind, fault)
        ProcessCollector(
            registry=registry
        )  # process_cpu_seconds_total, process_resident_memory_bytes, process_open_fds

    def batch(self, kind: str, rows: int, seconds: float) -> None:
        """Records a finished runtime call: its kind, its rows, and its duration in seconds."""
        self._rows[kind].observe(rows)
        self._calls[kind].observe(seconds)
        self.compute_seconds.inc(seconds)

    def price(self, currency: str, compute_s: float, machine_per_hour: float) -> None:
        """Sets the prices of a second of compute and of an hour of this machine."""
        self._compute_price.labels(currency).set(compute_s)
        self._machine_price.labels(currency).set(machine_per_hour)

    def failed_call(self, kind: str, fault: str) -> None:
        """Counts a failed runtime call. `fault` is its cause: rows, instance, or nobody (the instance was full)."""
        self._failed_calls.labels(kind, fault).inc()

    def requested(self, priority: str, compute_s: float) -> None:
        """Counts requested compute of a class, in seconds of one instance."""
        self._requested.labels(priority).inc(compute_s)

    def degraded(self, kind: str, priority: str) -> None:
        """Counts a request of a class that gave something up; `kind` is one of `DEGRADATIONS`."""
        self._degradations.labels(kind, priority).inc()

    def pressure(self, priority: str, late: bool) -> None:
        """Sets whether more is queued for a class than is done in the time that it may wait."""
        self._pressure.labels(priority).set(late)

    def watch_demand(self, left_s: Callable[[str], float], due_s: Callable[[float], float]) -> None:
        """Sets the functions that a scrape calls. They return seconds of one instance in full batches.

        Args:
            left_s: the work that is left for the outputs of a class.
            due_s: the work that is left for the outputs whose deadline is within some seconds.
        """
        for name in CLASSES:
            self._left.labels(name).set_function(functools.partial(left_s, name))
        for within_s in DUE_WITHIN_S:
            self._due.labels(f"{within_s:g}").set_function(functools.partial(due_s, within_s))

    def watch_instances(self, num_instances: int, live: Callable[[], float]) -> None:
        """Sets the number of instances, and the function that a scrape calls for the live ones."""
        self._instances.set(num_instances)
        self._live.set_function(live)

    def watch_streams(self, streams: Callable[[], float]) -> None:
        """Sets the function that a scrape calls for the number of open streams."""
        self._streams.set_function(streams)

    def watch_queue(
        self,
        waiting: Callable[[str], float],
        running: Callable[[], float],
        parked: Callable[[], float],
        backlog_s: Callable[[], float],
    ) -> None:
        """Sets the functions that a scrape calls.

        Args:
            waiting: outputs of a class that have not started.
            running: outputs that take steps.
            parked: outputs that wait in the middle of their steps.
            backlog_s: seconds that all instances need for all outputs.
        """
        self._backlog.set_function(backlog_s)
        for name in CLASSES:
            self._waiting.labels(name).set_function(functools.partial(waiting, name))
        self._running.set_function(running)
        self._parked.set_function(parked)

    def ended(self, status: str, seconds: float, tenant: str, priority: str) -> None:
        """Counts a generation that ended with a status, `seconds` after its acceptance."""
        (self._ended.get(status) or self._outcomes.labels(status)).inc()
        self._durations[priority].observe(seconds)
        self.tenants.ended(tenant, status)

    def previews(self, num_sent: int, num_bytes: int, num_dropped: int, first_s: float | None, priority: str) -> None:
        """Counts a generation's previews; the first was sent `first_s` seconds after acceptance (None: none was)."""
        if num_sent or num_dropped:
            self.previews_sent.inc(num_sent)
            self.preview_bytes.inc(num_bytes)
            self.previews_dropped.inc(num_dropped)
        if first_s is not None:
            self._first_preview.labels(priority).observe(first_s)

    def refused(self, reason: str, tenant: str | None = None) -> None:
        """Counts a request that was refused before it became a generation; `tenant` None: the tenant is unknown."""
        self._refused.labels(reason).inc()
        if tenant is not None:
            self.tenants.refused(tenant, reason)

    def http_request(self, route: str, status: int) -> None:
        """Counts an HTTP request: its route, such as "/v1/models/{model}", and the status code that it got."""
        self._http_requests.labels(route, str(status)).inc()


class TierMetrics:
    """Metrics of the cache tiers; `tier` is memory, disk, redis or objects (S3)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._got: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._gets = Counter("safelight_cache_gets", "Lookups in a tier", ["tier", "outcome"], registry=registry)
        self._seconds = Histogram(
            "safelight_cache_get_seconds", "Time of lookups in a tier", ["tier"], buckets=TIER_S, registry=registry
        )
        self._errors = Counter(
            "safelight_cache_errors",
            "Calls of a tier that were skipped or failed",
            ["tier", "reason"],
            registry=registry,
        )
        self._dropped = Counter(
            "safelight_cache_moves_dropped",
            "Values that were not written, for want of room or time",
            ["tier"],
            registry=registry,
        )
        self._bytes = Gauge("safelight_cache_bytes", "Bytes in a tier", ["tier"], registry=registry)
        self._entries = Gauge("safelight_cache_entries", "Entries of a tier", ["tier"], registry=registry)
        self._failures = Counter(
            "safelight_service_failures",
            "Calls of Redis, disk or S3 that failed or were too slow",
            ["service"],
            registry=registry,
        )
        self._breakers = Gauge(
            "safelight_breaker_state", "0 closed, 1 half-open, 2 open: left alone", ["service"], registry=registry
        )

        self._clock_offset = Gauge(
            "safelight_clock_offset_seconds", "How far this machine's clock is ahead of Redis'", registry=registry
        )

    def got(self, tier: str, outcome: str, seconds: float) -> None:
        """Records a lookup in a tier; `outcome` is hit, miss, expired, corrupt or unreadable."""
        at = (tier, outcome)
        if (resolved := self._got.get(at)) is None:
            for known in OUTCOMES:  # all series of a tier, so that its first fault shows as an increase
                self._gets.labels(tier, known)
            for reason in TIER_ERRORS:
                self._errors.labels(tier, reason)
            self._dropped.labels(tier)
            resolved = self._got[at] = (self._gets.labels(*at), self._seconds.labels(tier))
        resolved[0].inc()
        resolved[1].observe(seconds)

    def error(self, tier: str, reason: str) -> None:
        """Counts a failed or skipped call of a tier: unavailable, left_alone (open breaker), full or too_large."""
        self._errors.labels(tier, reason).inc()

    def dropped(self, tier: str) -> None:
        """Counts a value that was not written in the background, for want of room or time."""
        self._dropped.labels(tier).inc()

    def holds(self, tier: str, entries: int, num_bytes: int) -> None:
        """Sets the number of entries and of bytes in a tier."""
        self._entries.labels(tier).set(entries)
        self._bytes.labels(tier).set(num_bytes)

    def usage(self, tiers: Sequence[str]) -> list[TierUsage]:
        """The last measurement of each tier; zeros for a tier that was not measured yet."""
        entries, held = by_label(self._entries, "tier"), by_label(self._bytes, "tier")
        return [TierUsage(tier, int(entries.get(tier, 0)), int(held.get(tier, 0))) for tier in tiers]

    def clock_offset(self, seconds: float) -> None:
        """Sets how far this machine's clock is ahead of Redis'."""
        self._clock_offset.set(seconds)

    def service_failed(self, service: str) -> None:
        """Counts a call of a service that failed or was too slow."""
        self._failures.labels(service).inc()

    def breaker(self, service: str, state: int) -> None:
        """Sets the state of a circuit breaker: 0 closed, 1 half-open, 2 open."""
        self._failures.labels(service)  # so that its first failure shows as an increase
        self._breakers.labels(service).set(state)


class CacheMetrics:
    """Metrics of what the cache saves; `kind` of a hit is one of `HITS`, of a lookup one of `LOOKUPS`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._hits = Counter("safelight_cache_hits", "Outputs served by earlier work", ["kind"], registry=registry)
        self._steps = Counter("safelight_cache_steps_saved", "Denoising steps not made", ["kind"], registry=registry)
        self._compute = Counter(
            "safelight_cache_compute_seconds_saved",
            "Compute that the work served had cost",
            ["kind"],
            registry=registry,
        )
        self._lookups = Histogram(
            "safelight_cache_lookup_seconds",
            "Time of lookups for an output",
            ["kind"],
            buckets=TIER_S,
            registry=registry,
        )
        self._rejected = Counter(
            "safelight_cache_guard_rejections", "Similar pictures whose text says something else", registry=registry
        )
        self._not_kept = Counter(
            "safelight_cache_not_kept", "Results not kept because too many were being written", registry=registry
        )
        self._served = {
            kind: (self._hits.labels(kind), self._steps.labels(kind), self._compute.labels(kind)) for kind in HITS
        }
        self._looked = {kind: self._lookups.labels(kind) for kind in LOOKUPS}

    def looked(self, kind: str, seconds: float) -> None:
        """Records the duration of a cache lookup for one output."""
        self._looked[kind].observe(seconds)

    def served(self, kind: str, num_steps: int, compute_s: float) -> None:
        """Counts an output that earlier work served, and the denoising steps and compute seconds of that work."""
        hits, steps, compute = self._served[kind]
        hits.inc()
        steps.inc(num_steps)
        compute.inc(compute_s)

    def rejected(self) -> None:
        """Counts a similar picture that the text guard rejected: its prompt says something else."""
        self._rejected.inc()

    def not_kept(self) -> None:
        """Counts a result that was not cached because too many were being written."""
        self._not_kept.inc()

    def hits(self) -> list[Hits]:
        """Hits and their savings, by kind."""
        outputs, steps, compute = (by_label(metric, "kind") for metric in (self._hits, self._steps, self._compute))
        return [Hits(kind, int(count), int(steps[kind]), compute[kind]) for kind, count in outputs.items()]

    def lookups(self) -> list[Lookups]:
        """Durations of lookups, by kind."""
        return [Lookups(kind, seen) for kind, seen in distributions(self._lookups, "kind").items()]

    @property
    def num_rejected(self) -> int:
        """Similar pictures that the text guard rejected."""
        return int(value(self._rejected))

    @property
    def num_not_kept(self) -> int:
        """Results that were not cached because too many were being written."""
        return int(value(self._not_kept))
