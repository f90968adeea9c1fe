"""Metrics read back, for those who ask the server itself and not Prometheus.

What `metrics.py` counts, by the value of a metric's one label.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram saw.

    Attributes:
        bounds: of its buckets, rising; the last is infinite.
        counts: of what is at or below each bound.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @property
    def count(self) -> int:
        """How many."""
        return int(self.counts[-1]) if self.counts else 0

    def quantile(self, share: float) -> float:
        """The value below which that share lies, interpolated within its bucket; the last finite bound beyond it."""
        wanted = share * self.count
        below, floor = 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= wanted and count > below:
                inside = (wanted - below) / (count - below)
                return floor if bound == float("inf") else floor + inside * (bound - floor)
            below, floor = count, bound
        return 0.0


def by_label(metric: Counter | Gauge, label: str) -> dict[str, float]:
    """Values by label; those that were never touched are not there."""
    return {
        sample.labels[label]: sample.value
        for family in metric.collect()
        for sample in family.samples
        if label in sample.labels and not sample.name.endswith("_created")
    }


def value(metric: Counter) -> float:
    """Of a counter without labels."""
    return sum(s.value for family in metric.collect() for s in family.samples if s.name.endswith("_total"))


def distributions(metric: Histogram, label: str) -> dict[str, Distribution]:
    """Histograms by label."""
    samples = [sample for family in metric.collect() for sample in family.samples]
    found: dict[str, Distribution] = {}
    for name, group in itertools.groupby(samples, key=lambda sample: sample.labels[label]):
        own = list(group)
        buckets = [(float(s.labels["le"]), s.value) for s in own if s.name.endswith("_bucket")]
        total = sum(s.value for s in own if s.name.endswith("_sum"))
        found[name] = Distribution(tuple(b for b, _ in buckets), tuple(c for _, c in buckets), total)
    return found
