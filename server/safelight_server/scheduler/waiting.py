"""Queue of outputs that wait for a slot: priority classes by weight, callers in turn, earliest deadline first.

Classes are served by stride scheduling (Waldspurger & Weihl 1995): each grant
advances a class's pass by 1 / weight, and the class with the smallest pass is
served next. A class that was empty resumes at the pass of the last grant, so
that it cannot save up grants while it is idle.

Bounds for an output that waits in one class, whatever other outputs arrive, leave
or move. They hold for slots that become free; `slots.py` moves further slots. Let
`n` be the number of grants that its class gets up to its own:
- another class of weight v gets at most floor(n * v / weight) + 1 grants;
- another caller of its class gets at most one grant more than there are outputs
  of its own caller that start before it;
- of its own caller and class only outputs with an earlier (deadline, arrival)
  start before it; an output without a deadline comes after all that have one.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass

from safelight_server.scheduler.types import WEIGHTS, Priority, ScheduledOutput

Place = tuple[float, int, int]
"""Deadline in seconds, arrival number, output id: outputs of one caller start in this order."""


@dataclass(slots=True)
class _Waiting:
    """An output in the queue. `begun`: whether it has made a step since it arrived."""

    output: ScheduledOutput
    priority: Priority
    place: Place
    begun: bool


class WaitingQueue:
    """The outputs that wait for a slot, in the order in which they will get one."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Waiting] = {}
        self._callers: dict[Priority, OrderedDict[str, list[Place]]] = {p: OrderedDict() for p in Priority}
        self._counts = dict.fromkeys(Priority, 0)
        self._by_caller: dict[str, int] = {}
        self._passes = dict.fromkeys(Priority, 0.0)
        self._last_pass = 0.0

    def __len__(self) -> int:
        return len(self._outputs)

    def __contains__(self, output_id: int) -> bool:
        return output_id in self._outputs

    def count(self, priority: Priority) -> int:
        """Number of waiting outputs of a class."""
        return self._counts[priority]

    def count_caller(self, caller: str, priority: Priority | None = None) -> int:
        """Number of waiting outputs of a caller, in one class or over all."""
        if priority is None:
            return self._by_caller.get(caller, 0)
        return len(self._callers[priority].get(caller, ()))

    def count_tenant(self, tenant: str, priority: Priority) -> int:
        """Number of waiting outputs of a tenant's callers in a class."""
        callers = self._callers[priority].items()
        return sum(len(places) for caller, places in callers if caller.partition("/")[0] == tenant)

    def num_callers(self, priority: Priority, tenant: str | None = None) -> int:
        """Number of callers, of a tenant or of all, with waiting outputs in a class."""
        callers = self._callers[priority]
        if tenant is None:
            return len(callers)
        return sum(caller.partition("/")[0] == tenant for caller in callers)

    def callers(self, priority: Priority) -> list[str]:
        """The callers with waiting outputs in a class, in the order of their turns."""
        return list(self._callers[priority])

    def push(
        self, output: ScheduledOutput, priority: Priority, deadline: float | None, arrival: int, *, begun: bool = False
    ) -> None:
        """Adds an output.

        Args:
            arrival: its number in the order of arrival, also when it is added again.
            begun: whether it has made a step since it arrived.
        """
        self._insert(output, priority, (_latest(deadline), arrival, output.output_id), begun)

    def set_priority(self, output_id: int, priority: Priority) -> None:
        """Moves an output to another class; it keeps its arrival number."""
        if self._outputs[output_id].priority is not priority:
            waiting = self._take(output_id)
            self._insert(waiting.output, priority, waiting.place, waiting.begun)

    def set_deadline(self, output_id: int, deadline: float | None) -> None:
        """Changes an output's deadline, and with it its position among its caller's outputs."""
        waiting = self._outputs[output_id]
        places = self._callers[waiting.priority][waiting.output.caller]
        del places[bisect.bisect_left(places, waiting.place)]
        waiting.place = (_latest(deadline), *waiting.place[1:])
        bisect.insort(places, waiting.place)

    def remove(self, output_id: int) -> None:
        """Removes an output."""
        self._take(output_id)

    def pop(self) -> ScheduledOutput | None:
        """Removes and returns the output that starts next; None if none waits."""
        filled = [priority for priority in Priority if self._counts[priority]]
        if not filled:
            return None
        priority = min(filled, key=lambda p: (self._passes[p], p))
        self._last_pass = self._passes[priority]
        self._passes[priority] += 1 / WEIGHTS[priority]
        return self.pop_of(priority, next(iter(self._callers[priority])))

    def pop_of(self, priority: Priority, caller: str) -> ScheduledOutput:
        """Removes and returns the next output of a caller, without regard to the turns of classes and callers."""
        callers = self._callers[priority]
        callers.move_to_end(caller)
        return self._take(callers[caller][0][2]).output

    def first(self, priority: Priority, caller: str) -> int:
        """The first of a caller's outputs in a class, in the order in which they start."""
        return self._callers[priority][caller][0][2]

    def newcomer(self, priority: Priority, caller: str) -> int | None:
        """The first of a caller's outputs that has made no step yet, in the order in which they start."""
        places = self._callers[priority].get(caller, ())
        return next((output_id for *_, output_id in places if not self._outputs[output_id].begun), None)

    def order(self, priority: Priority) -> list[int]:
        """The outputs of a class in the order in which they will start, if no output is added or removed."""
        turns = itertools.zip_longest(*self._callers[priority].values())
        return [place[2] for turn in turns for place in turn if place is not None]

    def _insert(self, output: ScheduledOutput, priority: Priority, place: Place, begun: bool) -> None:
        if not self._counts[priority]:
            self._passes[priority] = max(self._passes[priority], self._last_pass)
        bisect.insort(self._callers[priority].setdefault(output.caller, []), place)
        self._outputs[output.output_id] = _Waiting(output, priority, place, begun)
        self._counts[priority] += 1
        self._by_caller[output.caller] = self._by_caller.get(output.caller, 0) + 1

    def _take(self, output_id: int) -> _Waiting:
        waiting = self._outputs.pop(output_id)
        caller, callers = waiting.output.caller, self._callers[waiting.priority]
        places = callers[caller]
        del places[bisect.bisect_left(places, waiting.place)]
        if not places:
            del callers[caller]
        self._counts[waiting.priority] -= 1
        self._by_caller[caller] -= 1
        if not self._by_caller[caller]:
            del self._by_caller[caller]
        return waiting


def _latest(deadline: float | None) -> float:
    return math.inf if deadline is None else deadline
