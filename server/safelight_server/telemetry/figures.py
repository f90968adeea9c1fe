"""Reads the server's own Prometheus metrics back: counts, and quantiles of histograms.

`CacheService.GetCacheStats` uses this, so that its callers need no Prometheus.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram


@dataclass(frozen=True, slots=True)
class Distribution:
    """The contents of a Prometheus histogram.

    Attributes:
        bounds: upper bounds of the buckets, rising; the last is infinite.
        counts: number of observations at or below each bound (cumulative).
        total: sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @property
    def count(self) -> int:
        """Number of observations."""
        return int(self.counts[-1]) if self.counts else 0

    def quantile(self, share: float) -> float:
        """Estimates a quantile (`share` of 0 to 1) by linear interpolation within its bucket.

        If the quantile lies above the largest finite bound, that bound; 0 without observations.
        """
        wanted = share * self.count
        below, floor = 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= wanted and count > below:
                inside = (wanted - below) / (count - below)
                return floor if bound == float("inf") else floor + inside * (bound - floor)
            below, floor = count, bound
        return 0.0


def by_label(metric: Counter | Gauge, label: str) -> dict[str, float]:
    """Values of a metric by the value of its label; label values that were never used are absent."""
    return {
        sample.labels[label]: sample.value
        for family in metric.collect()
        for sample in family.samples
        if label in sample.labels and not sample.name.endswith("_created")
    }


def value(metric: Counter) -> float:
    """The value of a counter that has no labels."""
    return sum(s.value for family in metric.collect() for s in family.samples if s.name.endswith("_total"))


def distributions(metric: Histogram, label: str) -> dict[str, Distribution]:
    """The distributions of a histogram by the value of its label."""
    samples = [sample for family in metric.collect() for sample in family.samples]
    found: dict[str, Distribution] = {}
    for name, group in itertools.groupby(samples, key=lambda sample: sample.labels[label]):
        own = list(group)
        buckets = [(float(s.labels["le"]), s.value) for s in own if s.name.endswith("_bucket")]
        total = sum(s.value for s in own if s.name.endswith("_sum"))
        found[name] = Distribution(tuple(b for b, _ in buckets), tuple(c for _, c in buckets), total)
    return found
