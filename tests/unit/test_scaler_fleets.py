"""The scaler's decisions if Prometheus answers only some queries."""

from __future__ import annotations

from typing import Any

import pytest
from safelight_server.scaler.demand import Demand, Policy
from safelight_server.scaler.fleets import Fleets
from safelight_server.scaler.prometheus import PrometheusError
from safelight_server.scaler.trigger import Trigger

TRIGGER = Trigger("", Policy(utilization=0.5), use_forecast=True)


class HalfAnswering:
    """Answers the present load, but no history."""

    async def demand(self, _selector: str) -> Demand:
        return Demand(rate=2.0)

    async def history(self, _selector: str, _end: int) -> Any:
        raise PrometheusError("too many samples")


class Silent(HalfAnswering):
    """Answers nothing."""

    async def demand(self, _selector: str) -> Demand:
        raise PrometheusError("gone")


async def test_without_a_history_arrivals_and_queue_decide():
    prometheus: Any = HalfAnswering()
    need = await Fleets(prometheus).need(TRIGGER)
    assert (need.replicas, need.because) == (4, "arrivals")


async def test_without_the_load_nothing_is_said():
    prometheus: Any = Silent()
    with pytest.raises(PrometheusError, match="gone"):
        await Fleets(prometheus).need(TRIGGER)
