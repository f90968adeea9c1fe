"""Reading values back from metrics: by label, and quantiles of histograms."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from safelight_server.telemetry.figures import Distribution, by_label, distributions, value
from safelight_server.telemetry.metrics import Hits, Metrics, TierUsage


def test_values_by_label_and_without() -> None:
    registry = CollectorRegistry()
    counter = Counter("c", "c", ["kind"], registry=registry)
    counter.labels("a").inc(3)
    counter.labels("b").inc(0)
    gauge = Gauge("g", "g", ["tier"], registry=registry)
    gauge.labels("memory").set(7)
    plain = Counter("p", "p", registry=registry)
    plain.inc(2)
    assert by_label(counter, "kind") == {"a": 3, "b": 0}
    assert by_label(gauge, "tier") == {"memory": 7}
    assert value(plain) == 2


def test_histograms_by_label() -> None:
    histogram = Histogram("h", "h", ["kind"], buckets=(1, 2, 4), registry=CollectorRegistry())
    for seconds in (0.5, 1.5, 1.5, 3):
        histogram.labels("a").observe(seconds)
    histogram.labels("b").observe(9)
    found = distributions(histogram, "kind")
    assert (found["a"].count, found["a"].total) == (4, 6.5)
    assert found["a"].quantile(0.25) == pytest.approx(1)
    assert found["a"].quantile(0.5) == pytest.approx(1.5), "half way into the bucket from 1 to 2"
    assert found["a"].quantile(1.0) == pytest.approx(4)
    assert found["b"].quantile(0.5) == 4, "beyond the last bound nothing is known"


def test_of_nothing_every_quantile_is_nothing() -> None:
    assert Distribution((), (), 0.0).quantile(0.5) == 0
    assert Distribution((1.0, float("inf")), (0, 0), 0.0).quantile(0.99) == 0


def test_figures_of_the_caches() -> None:
    metrics = Metrics()
    metrics.cache.served("similar", 20, 1.5)
    metrics.cache.served("similar", 10, 0.5)
    metrics.cache.looked("exact", 0.001)
    metrics.cache.rejected()
    metrics.cache.not_kept()
    metrics.tiers.holds("memory", 3, 300)
    hits = {hits.kind: hits for hits in metrics.cache.hits()}
    assert hits["similar"] == Hits("similar", 2, 30, 2.0)
    assert hits["exact"] == Hits("exact", 0, 0, 0.0)
    assert [lookups.seen.count for lookups in metrics.cache.lookups() if lookups.kind == "exact"] == [1]
    assert (metrics.cache.num_rejected, metrics.cache.num_not_kept) == (1, 1)
    assert metrics.tiers.usage(["memory", "disk"]) == [TierUsage("memory", 3, 300), TierUsage("disk", 0, 0)]
