"""What is ready for a batch: one queue per (kind, key), first come first served over all of them.

A member (an output, or a prompt to encode) gets a turn when it becomes ready.
Members of a batch that failed go first in line again, set apart in two halves:
a half shares its batches with nobody, so that a row which breaks every batch
it is in is alone after at most ceil(log2 n) failures of a batch of n members,
and its neighbours are out of danger as soon as their half succeeds.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safelight_server.scheduler.types import Kind, Member

Queue = tuple[Kind, str]
Turn = tuple[int, int]
"""No two lines have one in common. The second number is below 0 for who goes before the turn of the first."""
TOGETHER = 0


@dataclass(frozen=True, slots=True)
class _QueuePosition:
    turn: Turn
    group: int


class ReadyQueues:
    """Members in line, by queue. A queue that is empty is not kept."""

    def __init__(self) -> None:
        self._lines: dict[Queue, OrderedDict[Member, _QueuePosition]] = {}
        self._turns = itertools.count()
        self._groups = itertools.count(TOGETHER + 1)

    def __iter__(self) -> Iterator[Queue]:
        return iter(self._lines)

    def count(self, queue: Queue) -> int:
        """Members in line."""
        return len(self._lines.get(queue, ()))

    def members(self, queue: Queue) -> list[Member]:
        """The line, first to last."""
        return list(self._lines.get(queue, ()))

    def contains(self, queue: Queue, member: Member) -> bool:
        """Whether a member is in that line."""
        return member in self._lines.get(queue, ())

    def turn(self, queue: Queue) -> Turn:
        """When the first in line became ready: the smaller, the longer ago."""
        return next(iter(self._lines[queue].values())).turn

    def together(self, queue: Queue, limit: int) -> list[Member]:
        """The members at the head of a line that may share a batch, at most `limit`."""
        head = list(itertools.islice(self._lines[queue].items(), limit))
        group = head[0][1].group
        return [member for member, _ in itertools.takewhile(lambda at: at[1].group == group, head)]

    def push(self, queue: Queue, member: Member) -> None:
        """Adds a member at the end of a line; one that is in it already keeps its place."""
        self._lines.setdefault(queue, OrderedDict()).setdefault(
            member, _QueuePosition((next(self._turns), 0), TOGETHER)
        )

    def push_first(self, queue: Queue, members: Sequence[Member], *, apart: bool) -> None:
        """Puts the members of a failed batch first in line; `apart`: as two halves."""
        if not members:
            return
        line = self._lines.setdefault(queue, OrderedDict())
        number, before = self.turn(queue) if line else (next(self._turns), 0)
        turn = (number, before - 1)
        middle = (len(members) + 1) // 2 if apart else len(members)
        for half in (members[middle:], members[:middle]):
            place = _QueuePosition(turn, next(self._groups) if apart else TOGETHER)
            for member in reversed(half):
                line[member] = place
                line.move_to_end(member, last=False)

    def discard(self, queue: Queue, member: Member) -> None:
        """Takes a member out of a line, if it is in it."""
        line = self._lines.get(queue)
        if line is not None and line.pop(member, None) is not None and not line:
            del self._lines[queue]
