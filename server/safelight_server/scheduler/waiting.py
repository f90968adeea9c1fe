"""Who starts next: classes by weight, callers in turn, the earliest deadline first.

Classes are served by stride scheduling (Waldspurger & Weihl 1995): each grant
moves a class on by 1 / weight, and the one least far goes next; a class that
was empty starts where the others are, so that it saves nothing up. Bound: with
every class full, of any 13 grants in a row 8 are INTERACTIVE, 4 STANDARD and 1
BATCH; a caller's turn comes after one grant to each other caller of its class.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict

from safelight_server.scheduler.types import WEIGHTS, Output, Priority

_Entry = tuple[float, int, int]


class WaitingQueue:
    """Outputs that have not started."""

    def __init__(self) -> None:
        self._callers: dict[Priority, OrderedDict[str, list[_Entry]]] = {p: OrderedDict() for p in Priority}
        self._outputs: dict[int, Output] = {}
        self._class_of: dict[int, Priority] = {}
        self._passes = dict.fromkeys(Priority, 0.0)
        self._counts = dict.fromkeys(Priority, 0)
        self._by_caller: dict[str, int] = {}
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._outputs)

    def __contains__(self, output_id: int) -> bool:
        return output_id in self._outputs

    def count(self, priority: Priority) -> int:
        """Outputs of a class."""
        return self._counts[priority]

    def count_caller(self, caller: str) -> int:
        """Outputs of a caller, over all classes."""
        return self._by_caller.get(caller, 0)

    def push(self, output: Output, priority: Priority) -> None:
        """Adds an output to a class."""
        if not self._counts[priority]:
            floor = min((self._passes[p] for p in Priority if self._counts[p]), default=self._passes[priority])
            self._passes[priority] = max(self._passes[priority], floor)
        deadline = math.inf if output.deadline is None else output.deadline
        heap = self._callers[priority].setdefault(output.caller, [])
        heapq.heappush(heap, (deadline, next(self._arrivals), output.output_id))
        self._outputs[output.output_id] = output
        self._class_of[output.output_id] = priority
        self._counts[priority] += 1
        self._by_caller[output.caller] = self._by_caller.get(output.caller, 0) + 1

    def remove(self, output_id: int) -> Output:
        """Takes an output out; its place in a heap is skipped when it comes up."""
        output = self._outputs.pop(output_id)
        self._counts[self._class_of.pop(output_id)] -= 1
        self._by_caller[output.caller] -= 1
        if not self._by_caller[output.caller]:
            del self._by_caller[output.caller]
        return output

    def pop(self) -> Output | None:
        """The output that starts next."""
        filled = [priority for priority in Priority if self._counts[priority]]
        if not filled:
            return None
        priority = min(filled, key=lambda p: (self._passes[p], p))
        self._passes[priority] += 1 / WEIGHTS[priority]
        callers = self._callers[priority]
        while True:
            caller, heap = next(iter(callers.items()))
            entry = self._live(heap, priority)
            if not heap:
                del callers[caller]
            else:
                callers.move_to_end(caller)
            if entry is not None:
                return self.remove(entry)

    def order(self, priority: Priority) -> list[int]:
        """The outputs of a class in the order in which they will start, if none comes or goes."""
        queues = [
            [entry[2] for entry in sorted(heap) if self._class_of.get(entry[2]) is priority]
            for heap in self._callers[priority].values()
        ]
        turns = itertools.zip_longest(*queues)
        return [output_id for turn in turns for output_id in turn if output_id is not None]

    def ids(self) -> list[int]:
        """All outputs."""
        return list(self._outputs)

    def _live(self, heap: list[_Entry], priority: Priority) -> int | None:
        while heap:
            output_id = heapq.heappop(heap)[2]
            if self._class_of.get(output_id) is priority:
                return output_id
        return None
