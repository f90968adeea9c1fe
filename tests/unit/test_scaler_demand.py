"""How many replicas a load needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.scaler.demand import Demand, Policy, needed

POLICY = Policy(utilization=0.5, wait_s={"interactive": 5.0, "batch": 100.0}, min_replicas=0, max_replicas=50)


@pytest.mark.parametrize(
    ("demand", "replicas", "because"),
    [
        (Demand(), 0, "idle"),
        (Demand(rate=0.01), 1, "arrivals"),
        (Demand(rate=2.0), 4, "arrivals"),
        (Demand(left_s={"interactive": 10.0}, live_instances=2), 2, "queue"),
        (Demand(left_s={"interactive": 0.1}), 1, "queue"),
        # Late: it is worked off beside what arrives.
        (Demand(left_s={"interactive": 20.0}, rate=1.0, live_instances=2), 5, "queue"),
        # Batch work may wait, and what comes first is counted with it.
        (Demand(left_s={"batch": 100.0}, live_instances=1), 1, "queue"),
        (Demand(left_s={"interactive": 5.0, "batch": 195.0}, live_instances=2), 2, "queue"),
        # A deadline is nearer than the class has it.
        (Demand(left_s={"batch": 100.0}, due_s={10.0: 60.0, 60.0: 60.0}, live_instances=6), 6, "queue"),
        (Demand(rate=1.0, forecast=4.0), 8, "forecast"),
        (Demand(forecast=0.2), 0, "idle"),
        (Demand(forecast=2.0), 4, "forecast"),
        (Demand(held=3.0), 1, "held"),
        (Demand(held=3.0, rate=2.0), 4, "arrivals"),
        (Demand(rate=1000.0), 50, "arrivals"),
    ],
)
def test_the_largest_need_counts(demand, replicas, because):
    need = needed(demand, POLICY)
    assert (need.replicas, need.because) == (replicas, because)


def test_replicas_have_instances_and_a_least_number():
    policy = Policy(instances=4, utilization=0.5, min_replicas=1)
    assert needed(Demand(rate=4.0), policy).replicas == 2
    assert needed(Demand(), policy).replicas == 1


SECONDS = st.floats(0, 1e5)


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS | st.none())
def test_a_forecast_never_takes_away_what_the_queue_needs(interactive, batch, rate, live, forecast):
    load = Demand({"interactive": interactive, "batch": batch}, {}, rate, live)
    without = needed(load, POLICY).replicas
    with_forecast = needed(Demand(load.left_s, {}, rate, live, forecast), POLICY).replicas
    assert POLICY.min_replicas <= without <= with_forecast <= POLICY.max_replicas


@given(SECONDS, SECONDS, st.floats(0, 1e3))
def test_more_work_never_needs_fewer(interactive, batch, more):
    def replicas(extra: float) -> int:
        return needed(Demand({"interactive": interactive + extra, "batch": batch}, live_instances=3), POLICY).replicas

    assert replicas(0.0) <= replicas(more)
