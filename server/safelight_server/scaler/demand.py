"""How many replicas a load needs. Pure.

Work is counted in seconds of compute: the time that one instance takes for it in
full batches, so that a replica does `instances` such seconds in each second.
Three needs are computed, and the largest counts:

- arrivals: the compute that is requested now may take at most `utilization` of the
  fleet;
- queue: for each time span, all work that is due within it is done within it (the
  demand bound of earliest-deadline-first; Baruah, Rosier and Howell 1990). Each class
  has such a span: how long its work may wait. If a queue is late, the work that arrives
  meanwhile is added;
- forecast: the compute that will be requested when a replica that is started now is
  ready.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

WAIT_S: Mapping[str, float] = {"interactive": 5.0, "standard": 60.0, "batch": 600.0}
"""How long work of a class may wait, by default."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The load of a fleet at one moment.

    Attributes:
        left_s: seconds of compute that are left for accepted outputs, by class.
        due_s: seconds of compute that are due within a time span, by that span in seconds.
        rate: seconds of compute that are requested per second, over the last minute.
        live_instances: live instances of all replicas.
        forecast: the highest forecast of `rate`; None: there is no forecast.
    """

    left_s: Mapping[str, float] = field(default_factory=dict)
    due_s: Mapping[float, float] = field(default_factory=dict)
    rate: float = 0.0
    live_instances: float = 0.0
    forecast: float | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is requested and nothing is left to do."""
        return self.rate <= 0 and not any(seconds > 0 for seconds in self.left_s.values())


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's policy for a fleet.

    Attributes:
        instances: instances of a replica.
        utilization: share of the fleet that arrivals may take, above 0 and at most 1.
        wait_s: how long work of a class may wait.
        min_replicas: lower bound on the result; with 0 an idle fleet is stopped.
        max_replicas: upper bound on the result.
    """

    instances: int = 1
    utilization: float = 0.8
    wait_s: Mapping[str, float] = field(default_factory=lambda: WAIT_S)
    min_replicas: int = 0
    max_replicas: int = 100


@dataclass(frozen=True, slots=True)
class Need:
    """How many replicas are needed.

    Attributes:
        replicas: within the policy's bounds.
        because: the need that decided: `arrivals`, `queue`, `forecast` or `idle`.
        by: replicas that each need takes, not rounded.
    """

    replicas: int
    because: str
    by: Mapping[str, float]


def needed(demand: Demand, policy: Policy) -> Need:
    """The replicas that a load needs."""
    by = {
        "arrivals": demand.rate / policy.utilization / policy.instances,
        "queue": _queue(demand, policy) / policy.instances,
        "forecast": (demand.forecast or 0.0) / policy.utilization / policy.instances,
    }
    because = max(by, key=lambda name: by[name]) if not demand.is_idle or by["forecast"] >= 1 else "idle"
    wanted = 0 if because == "idle" else max(1, math.ceil(by[because] - 1e-9))
    return Need(min(policy.max_replicas, max(policy.min_replicas, wanted)), because, by)


def _queue(demand: Demand, policy: Policy) -> float:
    """Instances needed so that all work that is due within each time span is done within it."""
    spans = sorted({*policy.wait_s.values(), *demand.due_s})
    most = 0.0
    for span in spans:
        classes = sum(demand.left_s.get(name, 0.0) for name, wait_s in policy.wait_s.items() if wait_s <= span)
        due = max((left for within, left in demand.due_s.items() if within <= span), default=0.0)
        work = max(classes, due)  # not the sum: work with a deadline is part of its class too
        late = demand.live_instances * span < work
        most = max(most, work / span + (demand.rate if late else 0.0))
    return most
