"""Who was refused for want of room and told when to come back. Pure: it is told the time.

Without it RetryInfo would say to everyone when there is room for one: whoever
comes back as told meets all others who were told the same, and newcomers who
were there a moment earlier. So whoever is refused is told a time after those
before it, and what has come free by then is kept for it, for a while and as far
as newcomers still find a part. A request is known by its caller and its request
id; one without an id is told the same times, and nothing is kept for it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

GRACE_SHARE, MIN_GRACE_S = 0.25, 1.0
"""How much later than told a client may come, by the time that it was told to wait; clients spread their retries."""
MAX_PROMISES = 10_000
"""Promises that are remembered; beyond them the oldest are forgotten."""


@dataclass(slots=True)
class Promise:
    """What one request was told.

    Attributes:
        subject: whose bound it has met.
        due: when it is to come back.
        until: how long its room is kept.
    """

    subject: str
    num_outputs: int
    due: float
    until: float


@dataclass(slots=True)
class _Line:
    """The promises of one subject, by when they are due and by how long they hold, with the outputs of all."""

    by_due: list[tuple[float, str]] = field(default_factory=list)
    by_until: list[tuple[float, str]] = field(default_factory=list)
    num_outputs: int = 0


class Promises:
    """The promises of a server. A key is the caller with the request id."""

    def __init__(self, max_promises: int = MAX_PROMISES) -> None:
        self._max_promises = max_promises
        self._by_key: dict[str, Promise] = {}
        self._lines: dict[str, _Line] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def of(self, key: str, now: float) -> Promise | None:
        """The promise of a request, if it has one that still holds."""
        promise = self._by_key.get(key)
        return promise if promise is not None and now <= promise.until else None

    def num_ahead(self, subject: str, now: float) -> int:
        """Outputs that were told to come and have not come yet."""
        self._expire(subject, now)
        return self._lines[subject].num_outputs if subject in self._lines else 0

    def num_held(self, subject: str, now: float, most: int) -> int:
        """Outputs that were told to come by now and have not come yet; at most `most`, where counting ends."""
        self._expire(subject, now)
        held = 0
        for due, key in self._lines[subject].by_due if subject in self._lines else ():
            if due > now or held >= most:
                break
            held += self._by_key[key].num_outputs
        return min(held, most)

    def make(self, key: str, subject: str, num_outputs: int, wait_s: float, now: float) -> None:
        """A request of so many outputs is told to come back after `wait_s`."""
        self.forget(key)
        if len(self._by_key) >= self._max_promises:
            self.forget(next(iter(self._by_key)))
        promise = Promise(subject, num_outputs, now + wait_s, now + wait_s + max(MIN_GRACE_S, GRACE_SHARE * wait_s))
        self._by_key[key] = promise
        line = self._lines.setdefault(subject, _Line())
        bisect.insort(line.by_due, (promise.due, key))
        bisect.insort(line.by_until, (promise.until, key))
        line.num_outputs += num_outputs

    def forget(self, key: str) -> None:
        """The request was let in, or is told something else."""
        promise = self._by_key.pop(key, None)
        if promise is None:
            return
        line = self._lines[promise.subject]
        for order, at in (line.by_due, promise.due), (line.by_until, promise.until):
            del order[bisect.bisect_left(order, (at, key))]
        line.num_outputs -= promise.num_outputs
        if not line.by_due:
            del self._lines[promise.subject]

    def _expire(self, subject: str, now: float) -> None:
        """Forgets those that have not come. One that is due later may end sooner: a short wait has a short grace."""
        while subject in self._lines:
            until, key = self._lines[subject].by_until[0]
            if until >= now:
                return
            self.forget(key)
