"""The metrics: their series, and series that exist before anything has happened."""

from __future__ import annotations

import pytest
from safelight_server.runtime.base import FaultOrigin
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Metrics
from safelight_server.telemetry.metrics import CLASSES, FAULTS
from safelight_server.telemetry.tenant_metrics import MAX_TENANTS, OTHERS


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"safelight_{name}", labels)


def test_tenants_beyond_the_bound_share_their_series() -> None:
    metrics = Metrics()
    for number in range(MAX_TENANTS + 5):
        metrics.ended("OK", 1.0, f"tenant{number}", "standard")
        metrics.tenants.computed(f"tenant{number}", "icons", 2.0)
    assert value(metrics, "tenant_generations_total", tenant="tenant0", status="OK") == 1
    assert value(metrics, "tenant_generations_total", tenant=OTHERS, status="OK") == 5
    assert value(metrics, "tenant_compute_seconds_total", tenant=OTHERS, model="icons") == 10
    assert value(metrics, "tenant_generations_total", tenant=f"tenant{MAX_TENANTS}", status="OK") is None


def test_a_refusal_counts_for_its_tenant_where_that_is_known() -> None:
    metrics = Metrics()
    metrics.refused("QUEUE_FULL", "studio")
    metrics.refused("QUEUE_FULL")
    assert value(metrics, "refused_total", reason="QUEUE_FULL") == 2
    assert value(metrics, "tenant_refused_total", tenant="studio", reason="QUEUE_FULL") == 1


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("generations_total", {"status": "INTERNAL"}),
        ("refused_total", {"reason": "QUEUE_FULL"}),
        ("failed_calls_total", {"kind": "denoise", "fault": "instance"}),
        ("first_preview_seconds_count", {"class": "interactive"}),
        ("cache_hits_total", {"kind": "exact"}),
    ],
)
def test_what_alerts_look_at_is_there_from_the_start(name: str, labels: dict[str, str]) -> None:
    assert value(Metrics(), name, **labels) == 0, "else the first increase is not seen"


def test_labels_are_the_words_of_those_who_count() -> None:
    assert tuple(origin.value for origin in FaultOrigin) == FAULTS
    assert tuple(priority.name.lower() for priority in Priority) == CLASSES
