"""Which requests were refused for want of room, and when they were told to come back. Pure: the time is an argument.

Without this, RetryInfo would send all refused clients back at the time when there
is room for one of them. So each refused request gets a later time than those refused
before it, and the room that is free by then is reserved for it: for a while, and only
for a part of each bound, so that newcomers find the rest. A request is identified by
its caller and its request id. A request without an id gets the same times, but no
room is reserved for it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

GRACE_SHARE, MIN_GRACE_S = 0.25, 1.0
"""A client may be late by this share of its waiting time, and by at least so many seconds: clients spread retries."""
MAX_PROMISES = 10_000
"""Promises that are remembered at most; the oldest go first."""


@dataclass(slots=True)
class Promise:
    """When one refused request is to come back.

    Attributes:
        subject: the class, tenant or caller whose bound refused it.
        due: when the request is to come back.
        until: when its reservation ends.
    """

    subject: str
    num_outputs: int
    due: float
    until: float


@dataclass(slots=True)
class _SubjectQueue:
    """The promises of one subject, ordered by `due` and by `until`, with the number of their outputs."""

    by_due: list[tuple[float, str]] = field(default_factory=list)
    by_until: list[tuple[float, str]] = field(default_factory=list)
    num_outputs: int = 0


class Promises:
    """The promises of a server. A key is the caller with the request id."""

    def __init__(self, max_promises: int = MAX_PROMISES) -> None:
        self._max_promises = max_promises
        self._by_key: dict[str, Promise] = {}
        self._queues: dict[str, _SubjectQueue] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def of(self, key: str, now: float) -> Promise | None:
        """The promise of a request, if it has one that still holds."""
        promise = self._by_key.get(key)
        return promise if promise is not None and now <= promise.until else None

    def num_ahead(self, subject: str, now: float) -> int:
        """Outputs of requests that were told to come back and have not come yet."""
        self._expire(subject, now)
        return self._queues[subject].num_outputs if subject in self._queues else 0

    def last_due(self, subject: str, now: float) -> float:
        """When the last of the requests of a subject is to come; `now` if none is to come."""
        self._expire(subject, now)
        return max(now, self._queues[subject].by_due[-1][0]) if subject in self._queues else now

    def num_held(self, subject: str, now: float, until: float, most: int, besides: str = "") -> int:
        """Outputs of requests that are due until a time and have not come yet. Counting ends at `most`.

        Args:
            besides: the key of a request that is not counted.
        """
        self._expire(subject, now)
        held = 0
        for due, key in self._queues[subject].by_due if subject in self._queues else ():
            if due > until or held >= most:
                break
            if key != besides:
                held += self._by_key[key].num_outputs
        return min(held, most)

    def make(self, key: str, subject: str, num_outputs: int, wait_s: float, now: float) -> None:
        """Records that a request of `num_outputs` outputs was told to come back after `wait_s`."""
        self.forget(key)
        if len(self._by_key) >= self._max_promises:
            self.forget(next(iter(self._by_key)))
        promise = Promise(subject, num_outputs, now + wait_s, now + wait_s + max(MIN_GRACE_S, GRACE_SHARE * wait_s))
        self._by_key[key] = promise
        queue = self._queues.setdefault(subject, _SubjectQueue())
        bisect.insort(queue.by_due, (promise.due, key))
        bisect.insort(queue.by_until, (promise.until, key))
        queue.num_outputs += num_outputs

    def forget(self, key: str) -> None:
        """Drops the promise of a request that was admitted or gets another one."""
        promise = self._by_key.pop(key, None)
        if promise is None:
            return
        queue = self._queues[promise.subject]
        for order, at in (queue.by_due, promise.due), (queue.by_until, promise.until):
            del order[bisect.bisect_left(order, (at, key))]
        queue.num_outputs -= promise.num_outputs
        if not queue.by_due:
            del self._queues[promise.subject]

    def _expire(self, subject: str, now: float) -> None:
        """Drops promises whose time has passed. One that is due later may end sooner: its grace is shorter."""
        while subject in self._queues:
            until, key = self._queues[subject].by_until[0]
            if until >= now:
                return
            self.forget(key)
