"""Simulates a fleet under a scaling policy: queued work, and replicas that take time to start."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from load_tests.scaling.traces import TICK_S

START_S = 240
"""Seconds from the request of a replica to its first call: for a node with a GPU, the image and the weights."""
HOLD_S = 300
"""Kubernetes' default scale-down stabilization: a fleet shrinks to the largest number requested in this time."""
WAIT_S = 5.0
"""Work that starts later than this many seconds after its arrival counts as missed."""
SYNC_TICKS = 3
"""A policy is asked every 30 s, as KEDA does."""


@dataclass(frozen=True, slots=True)
class State:
    """What a policy knows.

    Attributes:
        tick: number of the next tick.
        left: queued work, in seconds of compute.
        live, wanted: replicas that are ready, and the number that was requested last.
        busy: share of the live replicas' time that was used, over the last minute.
        rate: seconds of compute that were requested in a second, over the last minute.
    """

    tick: int
    left: float
    live: int
    wanted: int
    busy: float
    rate: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a policy.

    Attributes:
        replica_hours: hours to pay for, from the request of each replica to its end.
        needed_hours: hours of an ideal fleet that has in each tick exactly the compute that arrives in it.
        missed: share of the work that started later than `WAIT_S`.
        cold_starts: number of replicas that were started.
    """

    replica_hours: float
    needed_hours: float
    missed: float
    cold_starts: int

    @property
    def over(self) -> float:
        """Over-provisioning: hours beyond those needed, as a share of the needed hours."""
        return self.replica_hours / self.needed_hours - 1


def simulate(demand: NDArray[np.float64], policy: Callable[[State], int], first: int, initial: int) -> Outcome:
    """Runs a policy over a trace, beginning at tick `first`. Replicas have one instance.

    Args:
        policy: maps the state at a tick to the number of replicas to run.
        initial: number of replicas at the beginning.
    """
    live, starting = initial, deque[int]()  # ticks at which requested replicas will be ready
    asked = deque[tuple[int, int]]()
    queue = deque[tuple[int, float]]()  # tick of arrival, seconds of compute
    left = served_in_tick = 0.0
    used, rates = deque[tuple[float, int]](maxlen=60 // TICK_S), deque[float](maxlen=60 // TICK_S)
    paid = missed = total = 0.0
    cold_starts, wanted = 0, initial
    for tick in range(first, len(demand)):
        while starting and starting[0] <= tick:
            starting.popleft()
            live += 1
        if tick % SYNC_TICKS == 0:
            capacity = sum(count for _, count in used) * TICK_S
            busy = sum(one for one, _ in used) / capacity if capacity else 1.0
            wish = policy(State(tick, left, live, wanted, busy, sum(rates) / max(1, len(rates))))
            asked.append((tick, wish))
            while asked[0][0] < tick - HOLD_S // TICK_S:
                asked.popleft()
            wanted = max(one for _, one in asked)
            while live + len(starting) < wanted:
                starting.append(tick + START_S // TICK_S)
                cold_starts += 1
            while starting and live + len(starting) > wanted:
                starting.pop()
            live = min(live, wanted)
        work = float(demand[tick]) * TICK_S
        rates.append(float(demand[tick]))
        if work:
            queue.append((tick, work))
            left += work
            total += work
        room, served_in_tick = float(live * TICK_S), 0.0
        while queue and room > 1e-9:
            arrived, waiting = queue[0]
            done = min(room, waiting)
            room -= done
            served_in_tick += done
            # Work is done evenly over its tick; what arrived in this tick waits on average half of the tick at most.
            if (tick - arrived) * TICK_S > WAIT_S:
                missed += done
            if done < waiting - 1e-9:
                queue[0] = (arrived, waiting - done)
            else:
                queue.popleft()
        left = max(0.0, left - served_in_tick)
        used.append((served_in_tick, live))
        paid += (live + len(starting)) * TICK_S
    missed += left
    needed = float(np.ceil(demand[first:] - 1e-9).sum()) * TICK_S
    return Outcome(paid / 3600, needed / 3600, missed / total if total else 0.0, cold_starts)


def replicas_for(rate: float, utilization: float) -> int:
    """The number of replicas that a rate needs at a utilization."""
    return math.ceil(rate / utilization - 1e-9)
