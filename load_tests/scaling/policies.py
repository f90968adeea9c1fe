"""Scaling policies: each maps a state of the fleet to the number of replicas to run."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from safelight_server.scaler.demand import Demand, Policy, needed
from safelight_server.scaler.forecast import HISTORY_BINS, STEP_S, WEEK, Forecast, Seasons, forecast, seasons

from load_tests.scaling.fleet import START_S, State, replicas_for
from load_tests.scaling.traces import TICK_S, bins

TOLERANCE = 0.1
"""Kubernetes' default tolerance: a ratio that differs from 1 by less changes nothing."""
REFIT_BINS = WEEK // 7
"""Interval in which the forecast's seasons are fitted again: a day."""


def by_cpu(target: float) -> Callable[[State], int]:
    """Kubernetes' autoscaler on utilization: replicas times utilization divided by its target, at least one."""

    def policy(state: State) -> int:
        ratio = state.busy / target
        if abs(ratio - 1) <= TOLERANCE:
            return max(1, state.wanted)
        return max(1, math.ceil(state.live * ratio))

    return policy


def by_queue(wait_s: float) -> Callable[[State], int]:
    """KEDA on the queue alone: replicas to finish the queue in `wait_s`, plus those that are busy now; at least one."""

    def policy(state: State) -> int:
        return max(1, math.ceil(state.left / wait_s + state.live * state.busy - 1e-9))

    return policy


def by_foresight(demand: NDArray[np.float64], utilization: float) -> Callable[[State], int]:
    """Knows the demand until a replica that is started now is ready, and of the minute after."""
    minute = 60 // TICK_S
    smooth = np.convolve(demand, np.ones(minute) / minute, mode="same")

    def policy(state: State) -> int:
        ahead = smooth[state.tick : state.tick + START_S // TICK_S + minute]
        return max(1, replicas_for(float(ahead.max()), utilization))

    return policy


class Forecasts:
    """Forecasts along a trace, made once and used by policies. Each uses only the trace before it."""

    def __init__(self, demand: NDArray[np.float64], first_bin: int) -> None:
        self.bins = bins(demand, STEP_S)
        self.made: dict[int, Forecast | None] = {}
        found: Seasons | None = None
        for end in range(first_bin, len(self.bins)):
            history = self.bins[max(0, end - HISTORY_BINS) : end]
            if (end - first_bin) % REFIT_BINS == 0:
                found = seasons(history, end)
            self.made[end] = forecast(history, end, found)

    def accuracy(self) -> dict[str, float]:
        """1 - MAPE of the forecast, of the value a week before, and of the last bin's value.

        Only bins whose demand is at least a tenth of the mean count.
        """
        floor = self.bins.mean() / 10
        rows = []
        for end, made in self.made.items():
            if made is None or end + 1 >= len(self.bins) or min(self.bins[end : end + 2]) < floor:
                continue
            for ahead, ours in ((0, made.in_15_min), (1, made.in_30_min)):
                real = self.bins[end + ahead]
                last_week, last_bin = self.bins[end + ahead - WEEK], self.bins[end - 1]
                rows.append([ahead, *(abs(one - real) / real for one in (ours, last_week, last_bin))])
        table = np.array(rows)
        return {
            f"{name}_{minutes}_min": 1 - float(table[table[:, 0] == ahead, column].mean())
            for ahead, minutes in ((0, 15), (1, 30))
            for column, name in ((1, "forecast"), (2, "last_week"), (3, "last_bin"))
        }


def by_scaler(forecasts: Forecasts | None, policy: Policy) -> Callable[[State], int]:
    """The policy of `safelight scaler`, with or without a forecast."""

    def wanted(state: State) -> int:
        made = None if forecasts is None else forecasts.made.get(state.tick * TICK_S // STEP_S)
        demand = Demand(
            left_s={"interactive": state.left},
            rate=state.rate,
            live_instances=state.live,
            forecast=None if made is None else made.highest,
        )
        return needed(demand, policy).replicas

    return wanted
