"""Scaling policies of a fleet, simulated on traces of demand: what each over-provisions, and what waits too long.

This does not measure the machine: the same seeds give the same figures everywhere.
SCALING_TRACE can name a CSV file of `timestamp,value`, which is then simulated
beside the generated traces.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safelight_server.scaler.demand import Policy
from safelight_server.scaler.forecast import WEEK

from load_tests.bench.runner import Report, Row, Target
from load_tests.scaling import traces
from load_tests.scaling.fleet import replicas_for, simulate
from load_tests.scaling.policies import Forecasts, by_cpu, by_foresight, by_queue, by_scaler

TRACE = "SCALING_TRACE"
CPU_TARGETS = (0.5, 0.6, 0.7)
UTILIZATIONS = (0.9, 0.8, 0.7)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to simulate.

    Attributes:
        num_weeks: weeks of each generated trace; the policies run in the last one, the others are their history.
    """

    num_weeks: int = 4
    mean: float = 6.0
    seeds: tuple[int, ...] = (1, 2)


SMOKE = Plan(num_weeks=3, mean=1.0, seeds=(1,))


def measure(plan: Plan) -> Report:
    """Runs every policy over every trace."""
    tables: dict[str, list[Row]] = {}
    accuracy: list[Row] = []
    targets: list[Target] = []
    for name, demand, first_week in _traces(plan):
        forecasts = Forecasts(demand, first_week * WEEK)
        accuracy.append({"trace": name, **forecasts.accuracy()})
        rows = _policies(demand, first_week, forecasts)
        tables[name] = rows
        targets.append(_target(name, rows))
    tables["Accuracy of forecasts, 1 - MAPE"] = accuracy
    return Report("scaling", tables, targets)


def _traces(plan: Plan) -> list[tuple[str, NDArray[np.float64], int]]:
    found = [
        (
            f"Generated, {'with' if number == 0 else 'without'} a launch",
            traces.generated(seed, plan.num_weeks, plan.mean, launch=number == 0),
            plan.num_weeks - 1,
        )
        for number, seed in enumerate(plan.seeds)
    ]
    if path := os.environ.get(TRACE):
        whole = traces.read(Path(path), plan.mean)
        found.append((Path(path).name, whole[: 8 * traces.WEEK_TICKS], 4))
    return found


def _policies(demand: NDArray[np.float64], first_week: int, forecasts: Forecasts) -> list[Row]:
    first = first_week * traces.WEEK_TICKS
    hour = 3600 // traces.TICK_S
    initial = max(1, replicas_for(float(demand[first - hour : first].mean()), 0.7))
    policies = [(f"cpu {target:.0%}", by_cpu(target)) for target in CPU_TARGETS]
    policies += [(f"queue in {wait_s} s", by_queue(wait_s)) for wait_s in (5, 30)]
    for use in UTILIZATIONS:
        bounds = Policy(utilization=use, min_replicas=1)
        policies.append((f"scaler {use:.0%}", by_scaler(forecasts, bounds)))
    policies.append(("scaler 80%, no forecast", by_scaler(None, Policy(utilization=0.8, min_replicas=1))))
    policies += [(f"foresight {use:.0%}", by_foresight(demand, use)) for use in (0.9, 0.8)]
    rows: list[Row] = []
    for name, policy in policies:
        outcome = simulate(demand, policy, first, initial)
        rows.append(
            {
                "policy": name,
                "over_provisioning": outcome.over,
                "missed": outcome.missed,
                "cold_starts": outcome.cold_starts,
                "replica_hours": outcome.replica_hours,
            }
        )
    return rows


def _target(trace: str, rows: list[Row]) -> Target:
    """Over-provisioning by CPU at its best target, relative to that of the cheapest scaler that misses no more."""
    figures = {str(row["policy"]): (float(row["over_provisioning"]), float(row["missed"])) for row in rows}
    ours = [figure for name, figure in figures.items() if name.startswith("scaler")]
    ratios = []
    for name, (over, missed) in figures.items():
        if name.startswith("cpu"):
            ratios.append(over / min((one for one, misses in ours if misses <= missed), default=float("inf")))
    return Target(f"{trace}: over-provisioning by CPU to ours, at no more misses", min(ratios), 2.0)
