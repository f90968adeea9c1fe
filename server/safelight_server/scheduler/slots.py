"""Moves slots between outputs at their step boundaries, so that no wait depends on the length of other requests.

A free slot goes to the next output of `waiting.py`. When none is free, an output
that waits may take the slot of one that runs, which is then *parked*: it keeps
its latent and its arrival number, and waits. Four rules apply, in this order:

1. Shares of classes. Each class is entitled to its weight of the slots, as far
   as it has outputs (weighted max-min fairness; Bertsekas & Gallager, Data
   Networks, 1992, section 6.5). A class below its entitlement takes from the
   one that is furthest above its own.
2. Shares of callers. Within a class the caller with the fewest slots takes from
   the one with the most, while they differ by two or more.
3. Turns. Where a class has more callers than slots, an output that has made
   `TURN_STEPS` steps since it got its slot makes room for a caller with none.
4. First steps. Of a caller's INTERACTIVE outputs those that have made no step
   come first, then the others by arrival. An output that precedes the youngest
   one with a slot takes that slot: a person waits for a first preview, and can
   wait longer after having seen it. Pictures still end in the order of arrival.
   This is foreground-background scheduling (Kleinrock, Queueing Systems II, 1976,
   section 4.4) with one step as its only foreground. Between callers it changes
   nothing.

An output is parked only between two steps, and not before it has made one step
in its slot, so that each output makes progress. Rule 1 does not wait for that step
if each class is entitled to a slot, since then each makes progress anyway.

Bounds, in steps of the running outputs and not in their lengths: with `s` slots
for a class and `n` callers in it, the first output of a caller has a slot
- after one step, if its class or its caller is below its share;
- otherwise after ceil(n / s) turns;
and each further INTERACTIVE output of a caller that has a slot after one step;
unless `max_parked` outputs are parked: then it waits until one of them runs again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from safelight_server.scheduler.output_table import OutputEntry, OutputTable
from safelight_server.scheduler.types import WEIGHTS, Limits, OutputState, Priority
from safelight_server.scheduler.waiting import WaitingQueue

TURN_STEPS = 32
"""Steps that an output makes before it makes room for a caller of its class that has no slot. Most need fewer."""


class Slots:
    """Gives slots to outputs that wait."""

    def __init__(self, limits: Limits, waiting: WaitingQueue, table: OutputTable) -> None:
        self._limits = limits
        self._waiting = waiting
        self._table = table

    def grant(self) -> None:
        """Grants every free slot, then moves slots as long as a rule applies."""
        while self._table.num_running() < self._limits.max_running and (output := self._waiting.pop()) is not None:
            self._table.start(output.output_id)
        while len(self._waiting) and self._table.num_parked < self._limits.max_parked:
            if not any(self._move_to(priority) for priority in Priority if self._waiting.count(priority)):
                return

    def _move_to(self, priority: Priority) -> bool:
        """Moves one slot to a waiting output of a class. False if no rule applies."""
        caller = min(self._waiting.callers(priority), key=lambda name: self._held(priority, name))
        victim = self._of_another_class(priority) or self._of_another_caller(priority, self._held(priority, caller))
        if victim is None:
            return priority is Priority.INTERACTIVE and self._move_within_a_caller(priority)
        self._table.park(victim.output.output_id)
        self._table.start(self._waiting.pop_of(priority, caller).output_id)
        return True

    def _move_within_a_caller(self, priority: Priority) -> bool:
        """Moves one slot from the youngest output of a caller to one of the same caller that precedes it in rule 4."""
        for caller in self._waiting.callers(priority):
            victim = _last(self._table.running[priority].get(caller, {}), 1)
            if victim is None:
                continue
            output_id = self._waiting.newcomer(priority, caller)
            if output_id is None:
                output_id = self._waiting.first(priority, caller)
                if self._table.of[output_id].arrival > victim.arrival:
                    continue
            self._table.park(victim.output.output_id)
            self._waiting.remove(output_id)
            self._table.start(output_id)
            return True
        return False

    def _of_another_class(self, priority: Priority) -> OutputEntry | None:
        shares = entitlements(
            {one: self._table.num_running(one) + self._waiting.count(one) for one in Priority},
            self._limits.max_running,
        )
        above = {one: self._table.num_running(one) - shares[one] for one in Priority}
        if above[priority] >= 0:
            return None
        fewest = 0 if self._limits.max_running >= len(Priority) else 1
        for donor in sorted((one for one in Priority if above[one] > 0), key=lambda one: (-above[one], -one)):
            for entries in sorted(self._table.running[donor].values(), key=len, reverse=True):
                if (victim := _last(entries, fewest)) is not None:
                    return victim
        return None

    def _of_another_caller(self, priority: Priority, held: int) -> OutputEntry | None:
        """An output of a caller with at least two slots more than `held`; for `held` 0 also one whose turn is over."""
        callers = sorted(self._table.running[priority].values(), key=len, reverse=True)
        for entries in callers:
            if len(entries) < held + 2:
                break
            if (victim := _last(entries, 1)) is not None:
                return victim
        if held:
            return None
        turns = [entry for entries in callers for entry in entries.values() if _movable(entry, TURN_STEPS)]
        return max(turns, key=lambda entry: (_made(entry), entry.arrival), default=None)

    def _held(self, priority: Priority, caller: str) -> int:
        return len(self._table.running[priority].get(caller, ()))


def entitlements(wanted: Mapping[Priority, int], num_slots: int) -> dict[Priority, int]:
    """How many slots each class may hold: its share by weight, and what other classes leave of theirs.

    Args:
        wanted: outputs of each class that run or wait.

    Returns:
        At least 1 for each class with outputs, the highest class first, as far as there are slots.
    """
    shares = dict.fromkeys(Priority, 0)
    unserved = {priority for priority in Priority if wanted[priority]}
    left = num_slots
    while unserved:
        weight = sum(WEIGHTS[priority] for priority in unserved)
        satisfied = {priority for priority in unserved if wanted[priority] * weight <= left * WEIGHTS[priority]}
        if not satisfied:
            for priority in sorted(unserved):
                share = max(1, math.floor(left * WEIGHTS[priority] / weight))
                shares[priority] = min(share, num_slots - sum(shares.values()))
            break
        for priority in satisfied:
            shares[priority] = wanted[priority]
        left -= sum(wanted[priority] for priority in satisfied)
        unserved -= satisfied
    return shares


def _made(entry: OutputEntry) -> int:
    """Steps that an output has made since it got its slot."""
    return entry.step - entry.turn_step


def _movable(entry: OutputEntry, fewest: int) -> bool:
    """Whether an output is between two steps, and has made at least `fewest` since it got its slot."""
    between = entry.state is OutputState.DENOISING and len(entry.todo) == entry.num_rows
    return between and _made(entry) >= fewest


def _last(entries: Mapping[int, OutputEntry], fewest: int) -> OutputEntry | None:
    """The youngest output of a caller that can be parked; `fewest`: see `_movable`."""
    movable = [entry for entry in entries.values() if _movable(entry, fewest)]
    return max(movable, key=lambda entry: entry.arrival, default=None)
