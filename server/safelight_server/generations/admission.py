"""Admission: whether there is room and time for a request. The scheduler alone decides the order. Pure.

Outputs that find a free slot do not wait and are not counted as waiting.
Decisions use the scheduler's present numbers (`Load`). A refusal names the bound
that was reached, and the time after which the measured throughput will have made
room for this request and for those that were refused before it (`promises`). As
places become free, up to half of a bound is kept for those who are due by the time
at which as many are free: otherwise newcomers take each place before the client
comes for whom it became free.

No tenant can fill a class, and no caller the share of its tenant: each may hold at
most `ALPHA` times the room that it leaves free (dynamic thresholds; Choudhury & Hahne,
IEEE/ACM Transactions on Networking 6(2), 1998). So a lone tenant gets two thirds of a
class, two tenants get two fifths each, and a newcomer always finds room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from safelight_server.domain.errors import DeadlineUnreachableError, QueueFullError
from safelight_server.generations.promises import Promises
from safelight_server.generations.throughput import Throughput
from safelight_server.scheduler import WEIGHTS, Priority, ScheduledOutput

MIN_RETRY_S, MAX_RETRY_S, LATEST_RETRY_S = 0.1, 300.0, 900.0
"""Bounds of the times in RetryInfo. Nobody is told more than `MAX_RETRY_S` because of what the classes get now. As
clients must not all come at that time, some are told more than that, up to `LATEST_RETRY_S`."""
BATCH_ROOM = 4
"""The bound of class BATCH is this many times that of the other classes: its callers mind waiting least."""
ALPHA = 2
"""A tenant, or a caller of a tenant, may hold at most this many times the room that it leaves free."""
PROMISED_SHARE = 0.9
"""Of the places that are expected to become free, so many are promised. Newcomers get the rest if all goes as expected;
without a rest, those who come when they were told find no room as soon as less becomes free than expected."""
FAR_SHARE = 0.6
"""Those who are told `MAX_RETRY_S` and more come no closer together than this share of the server can serve: nobody
knows how much other classes will want then."""
EARLY_S = 0.05
"""A client that comes back so many seconds too soon still counts as punctual: clocks and timers are not exact."""
HELD_SHARE = 0.5
"""At most this share of a bound is reserved for clients that were told when to come back; the rest is for newcomers."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How many outputs may wait at once.

    Attributes:
        max_waiting: outputs that have not started, by class.
        max_waiting_per_caller: outputs of one caller that have not started, over all classes.
    """

    max_waiting: Mapping[Priority, int]
    max_waiting_per_caller: int


class Load(Protocol):
    """The scheduler's present load; see `scheduler.Scheduler`."""

    @property
    def num_outputs(self) -> int:
        """Outputs that have not ended."""

    def num_ended_of(self, priority: Priority) -> int:
        """Outputs of a class that have ended since the start."""

    @property
    def num_free(self) -> int:
        """Slots that no output holds or waits for."""

    def num_outputs_of(self, priority: Priority) -> int:
        """Outputs of a class that have not ended."""

    def num_waiting(self, priority: Priority | None = None) -> int:
        """Outputs that have not started, of a class or of all."""

    def num_waiting_of(self, caller: str, priority: Priority | None = None) -> int:
        """Outputs of a caller that have not started, of a class or of all."""

    def num_waiting_of_tenant(self, tenant: str, priority: Priority) -> int:
        """Outputs of a tenant that have not started, of a class."""

    def num_callers_waiting(self, priority: Priority, tenant: str | None = None) -> int:
        """Callers, of a tenant or of all, with outputs of a class that have not started."""

    def backlog_s(self) -> float:
        """Seconds that all instances together need for all outputs."""

    def estimate_s(self, output: ScheduledOutput, num_outputs: int = 1) -> float:
        """Seconds until `num_outputs` outputs like `output` would be finished, under the present load."""


@dataclass(frozen=True, slots=True)
class _WaitLimit:
    """A bound on the outputs that wait.

    Attributes:
        name: what is bounded: class, tenant or caller.
        subject: which one.
        waiting: outputs of the subject that wait.
        room: how many more may wait; below 0 if fewer should.
        share: of the outputs of the class that end, the part that makes room here.
    """

    name: str
    subject: str
    waiting: int
    room: int
    share: float

    @property
    def limit(self) -> int:
        """How many outputs of the subject may wait now."""
        return max(0, self.waiting + self.room)


class Admission:
    """Admits requests, and remembers when those that were refused are to come back.

    Attributes:
        promises: when refused requests were told to come back. A key is the caller with the request id.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self.promises = Promises()
        self._limits = limits
        self._throughput = Throughput()

    def admit(
        self,
        load: Load,
        output: ScheduledOutput,
        num_outputs: int,
        time_left_s: float | None,
        key: str,
        now: float,
    ) -> float:
        """Admits `num_outputs` outputs like `output`, or raises.

        Args:
            time_left_s: seconds to the deadline of the call; None: it has no deadline.
            key: the request's key in `promises`; empty: it has none.
            now: seconds, always of the same monotonic clock.

        Returns:
            Seconds until the outputs are expected to be finished.

        Raises:
            QueueFullError: there is no room; the error says when there will be.
            DeadlineUnreachableError: the outputs cannot be finished in `time_left_s`.
        """
        priority = output.priority
        self._throughput.observe(priority, load.num_ended_of(priority), load.num_waiting(priority) > 0, now)
        would_wait = max(0, num_outputs - load.num_free)
        if would_wait:
            self._check_room(load, output, would_wait, key, now)
        needed_s = load.estimate_s(output, num_outputs)
        if time_left_s is not None and needed_s > time_left_s:
            available_s = max(0.0, time_left_s)
            raise DeadlineUnreachableError(
                f"about {needed_s:.2f} s are needed, the deadline leaves {available_s:.2f} s",
                metadata={"needed_s": f"{needed_s:.3f}", "available_s": f"{available_s:.3f}"},
            )
        self.promises.forget(key)
        return needed_s

    def _check_room(self, load: Load, output: ScheduledOutput, would_wait: int, key: str, now: float) -> None:
        promise = self.promises.of(key, now)
        is_back = promise is not None and promise.due <= now + EARLY_S
        if is_back:
            self.promises.forget(key)  # it is admitted, or gets another one
        for bound in _bounds(load, self._limits, output):
            first, again = bound.subject, f"{bound.subject} again"  # who came back to no room goes before all others
            ahead = self.promises.num_ahead(again, now)
            ahead += 0 if is_back else self.promises.num_ahead(first, now)
            if would_wait <= bound.room and (is_back or not ahead):
                continue
            per_output_s = self._per_output_s(load, output.priority) / bound.share
            held = 0
            if not is_back:
                most = int(HELD_SHARE * bound.limit)
                until = now + most * per_output_s  # so many places become free by then
                held = self.promises.num_held(again, now, until, most, key)
                held += self.promises.num_held(first, now, until, most - held, key)
            if would_wait + held <= bound.room:
                continue
            if promise is not None and not is_back:
                retry_after_s: float | None = promise.due - now  # the client has come back too early
            else:
                subject = again if is_back else first
                last_s = self.promises.last_due(subject, now) - now
                retry_after_s = _retry_after_s(load, bound, would_wait, ahead, last_s, per_output_s)
                if retry_after_s is not None and key:
                    self.promises.make(key, subject, would_wait, retry_after_s, now)
            raise _queue_full(bound, would_wait, held, retry_after_s)

    def _per_output_s(self, load: Load, priority: Priority) -> float:
        """Seconds in which one output of a class ends while others of it wait.

        By the cost curves a class gets its weight's share among the classes that have outputs.
        """
        competing = [other for other in Priority if other is priority or load.num_outputs_of(other)]
        share = WEIGHTS[priority] / sum(WEIGHTS[other] for other in competing)
        return self._throughput.seconds_per_output(priority, _seconds_per_output(load) / share)


def _seconds_per_output(load: Load) -> float:
    """Seconds in which one output ends, of whatever class, by the cost curves."""
    return load.backlog_s() / max(1, load.num_outputs)


def _bounds(load: Load, limits: AdmissionLimits, output: ScheduledOutput) -> Iterator[_WaitLimit]:
    """The bounds that outputs like `output` come under."""
    priority, caller, tenant = output.priority, output.caller, output.tenant
    of_class, of_tenant = load.num_waiting(priority), load.num_waiting_of_tenant(tenant, priority)
    of_caller, of_caller_in_all = load.num_waiting_of(caller, priority), load.num_waiting_of(caller)
    free = limits.max_waiting[priority] - of_class
    callers = max(1, load.num_callers_waiting(priority))
    share_of_tenant = max(1, load.num_callers_waiting(priority, tenant)) / callers
    # With n more, a tenant may hold ALPHA * (free - n) + 1 of its class, a caller ALPHA * (what its tenant may hold and
    # does not) + 1. Solved for the largest n.
    left_by_tenant = ALPHA * free + 1 - of_tenant
    room_of_tenant = left_by_tenant // (ALPHA + 1)
    room_of_caller = (ALPHA * left_by_tenant + 1 - of_caller) // (ALPHA**2 + ALPHA + 1)
    room_in_all = limits.max_waiting_per_caller - of_caller_in_all
    in_class = f"in class {priority.name}"
    yield _WaitLimit("class", f"class {priority.name}", of_class, free, 1.0)
    yield _WaitLimit("tenant", f"tenant {tenant} {in_class}", of_tenant, room_of_tenant, share_of_tenant)
    yield _WaitLimit("caller", f"caller {caller} {in_class}", of_caller, room_of_caller, 1 / callers)
    yield _WaitLimit("caller", f"caller {caller}", of_caller_in_all, room_in_all, 1 / callers)


def _queue_full(bound: _WaitLimit, would_wait: int, held: int, retry_after_s: float | None) -> QueueFullError:
    waiting, limit = bound.waiting, bound.limit
    return QueueFullError(
        f"{waiting} of {limit} outputs of {bound.subject} wait already, {would_wait} more would have to"
        + (f"; {held} places are kept for those who were told to come" if held else ""),
        metadata={"bound": bound.name, "subject": bound.subject, "waiting": str(waiting), "limit": str(limit)},
        retry_after_s=retry_after_s,
    )


def _retry_after_s(
    load: Load, bound: _WaitLimit, num_outputs: int, ahead: int, last_s: float, per_output_s: float
) -> float | None:
    """Seconds until there is room, after all who were told to come before; None: never, so many do not fit at all.

    Each output that ends lets one that waits start, or leaves a slot free. Who is told later comes later by the time in
    which its places become free: if the estimate has changed since, times would overlap otherwise, and more would come
    at once than find room.

    Args:
        ahead: outputs of those who come before.
        last_s: when the last of them comes.
        per_output_s: seconds in which one place becomes free.
    """
    missing = num_outputs - bound.room
    if missing > load.num_outputs:
        return None
    promised_s = per_output_s / PROMISED_SHARE
    seconds = max(1, missing + ahead) * promised_s
    if ahead:
        seconds = max(seconds, last_s + num_outputs * promised_s)
    if seconds > MAX_RETRY_S:
        fastest_s = _seconds_per_output(load) / bound.share / FAR_SHARE
        seconds = min(max(MAX_RETRY_S, last_s + num_outputs * fastest_s), LATEST_RETRY_S)
    return max(MIN_RETRY_S, round(seconds, 3))  # rounded up further, each would be told later than its place is free
