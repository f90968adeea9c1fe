"""Queues of work that is ready for a batch: one per (kind, key, priority class), each in order of arrival.

A member (an output, or a prompt to encode) gets a turn number when it becomes
ready. The members of a failed batch go back to the head of their queue, split
into two halves, and a half shares its batches with no other member. This is a
bisection: a row that breaks every batch it is in runs alone after at most
ceil(log2 n) failures of a batch of n members, and the other members are safe as
soon as their half succeeds.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from safelight_server.scheduler.types import Kind, Member, Priority


class Queue(NamedTuple):
    """Names a queue. Members of queues of equal kind and key can share a batch."""

    kind: Kind
    key: str
    priority: Priority


Turn = tuple[int, int]
"""Order of service, smallest first: a number from one counter, then 0; below 0 for members that were put in front."""
TOGETHER = 0
"""The group of members that are not suspected of a failure. Members share a batch only within their group."""


@dataclass(frozen=True, slots=True)
class _QueuePosition:
    turn: Turn
    group: int


class ReadyQueues:
    """The ready members of every queue, in order. Empty queues are removed."""

    def __init__(self) -> None:
        self._lines: dict[Queue, OrderedDict[Member, _QueuePosition]] = {}
        self._turns = itertools.count()
        self._groups = itertools.count(TOGETHER + 1)

    def __iter__(self) -> Iterator[Queue]:
        return iter(self._lines)

    def count(self, queue: Queue) -> int:
        """Number of members in a queue."""
        return len(self._lines.get(queue, ()))

    def members(self, queue: Queue) -> list[Member]:
        """The members of a queue, first to last."""
        return list(self._lines.get(queue, ()))

    def contains(self, queue: Queue, member: Member) -> bool:
        """Whether a member is in a queue."""
        return member in self._lines.get(queue, ())

    def turn(self, queue: Queue) -> Turn:
        """The turn of a queue's first member: the smaller, the longer it has been ready."""
        return next(iter(self._lines[queue].values())).turn

    def together(self, queue: Queue, limit: int) -> list[Member]:
        """The members at the head of a queue that may share a batch, at most `limit`."""
        head = list(itertools.islice(self._lines[queue].items(), limit))
        group = head[0][1].group
        return [member for member, _ in itertools.takewhile(lambda at: at[1].group == group, head)]

    def suspected(self, queue: Queue) -> bool:
        """Whether the first member was in a batch that failed, so that it shares a batch with its half only."""
        return next(iter(self._lines[queue].values())).group != TOGETHER

    def push(self, queue: Queue, member: Member) -> None:
        """Adds a member at the end of a queue; a member that is in it already keeps its position."""
        self._lines.setdefault(queue, OrderedDict()).setdefault(
            member, _QueuePosition((next(self._turns), 0), TOGETHER)
        )

    def push_first(self, queue: Queue, members: Sequence[Member], *, apart: bool) -> None:
        """Puts the members of a failed batch at the head of a queue; `apart`: as two halves that share no batch."""
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
        """Removes a member from a queue, if it is in it."""
        line = self._lines.get(queue)
        if line is not None and line.pop(member, None) is not None and not line:
            del self._lines[queue]
