"""Tests of the seasonal alerts on synthetic traffic, evaluated by Prometheus itself."""

from __future__ import annotations

import pytest

from load_tests.seasons.__main__ import STATIC, evaluate
from load_tests.seasons.traffic import EVENTS


@pytest.mark.timeout(120)
def test_the_seasonal_alerts_see_what_happens_with_fewer_false_alarms_than_static_thresholds() -> None:
    scores = evaluate([1])
    seasonal = scores["seasonal"]
    assert seasonal["false_hours_per_week"] <= 2
    assert sum(seasonal["seen"].values()) >= len(EVENTS) - 2, "all but one of those in the last two weeks"
    for name in STATIC:
        assert sum(scores[name]["seen"].values()) < sum(seasonal["seen"].values())
    sensitive = scores[next(iter(STATIC))]
    assert sensitive["false_hours_per_week"] > 5 * seasonal["false_hours_per_week"]
