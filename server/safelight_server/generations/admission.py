"""Admission: whether there is room and time for a request. The scheduler alone decides the order. Pure.

Outputs that find a free slot do not wait and are not counted as waiting.
Decisions use the scheduler's present numbers (`Load`). A refusal names the bound
that was reached, and the time after which the measured throughput will have made
room for this request and for those that were refused before it (`promises`).

No tenant can fill a class, and no caller the share of its tenant: each may hold at
most `ALPHA` times the room that it leaves free (dynamic thresholds; Choudhury & Hahne,
IEEE/ACM Transactions on Networking 6(2), 1998). So a lone tenant gets two thirds of a
class, two tenants get two fifths each, and a newcomer always finds room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from safelight_server.domain.errors import DeadlineUnreachableError, QueueFullError
from safelight_server.generations.promises import Promises
from safelight_server.scheduler import WEIGHTS, Priority, ScheduledOutput

MIN_RETRY_S, MAX_RETRY_S = 0.1, 300.0
BATCH_ROOM = 4
"""The bound of class BATCH is this many times that of the other classes: its callers mind waiting least."""
ALPHA = 2
"""A tenant, or a caller of a tenant, may hold at most this many times the room that it leaves free."""
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

    def backlog_s(self) -> float:
        """Seconds that all instances together need for all outputs."""

    def estimate_s(self, output: ScheduledOutput, num_outputs: int = 1) -> float:
        """Seconds until `num_outputs` outputs like `output` would be finished, under the present load."""


def admit(
    load: Load,
    limits: AdmissionLimits,
    output: ScheduledOutput,
    num_outputs: int,
    time_left_s: float | None,
    promises: Promises,
    key: str,
    now: float,
) -> float:
    """Admits `num_outputs` outputs like `output`, or raises.

    Args:
        time_left_s: seconds to the deadline of the call; None: it has no deadline.
        promises: when refused requests were told to come back; a refusal of this request is added.
        key: the request's key in `promises`; empty: it has none.
        now: seconds, on the clock of `promises`.

    Returns:
        Seconds until the outputs are expected to be finished.

    Raises:
        QueueFullError: there is no room; the error says when there will be.
        DeadlineUnreachableError: the outputs cannot be finished in `time_left_s`.
    """
    _check_room(load, limits, output, num_outputs, promises, key, now)
    needed_s = load.estimate_s(output, num_outputs)
    if time_left_s is not None and needed_s > time_left_s:
        available_s = max(0.0, time_left_s)
        raise DeadlineUnreachableError(
            f"about {needed_s:.2f} s are needed, the deadline leaves {available_s:.2f} s",
            metadata={"needed_s": f"{needed_s:.3f}", "available_s": f"{available_s:.3f}"},
        )
    promises.forget(key)
    return needed_s


def _check_room(
    load: Load,
    limits: AdmissionLimits,
    output: ScheduledOutput,
    num_outputs: int,
    promises: Promises,
    key: str,
    now: float,
) -> None:
    would_wait = max(0, num_outputs - load.num_free)
    if not would_wait:
        return
    priority, caller, tenant = output.priority, output.caller, output.tenant
    promise = promises.of(key, now)
    is_back = promise is not None and promise.due <= now + EARLY_S
    of_class, max_of_class = load.num_waiting(priority), limits.max_waiting[priority]
    of_tenant = load.num_waiting_of_tenant(tenant, priority)
    max_of_tenant = ALPHA * (max_of_class - of_class - would_wait) + 1
    max_of_caller = ALPHA * (max_of_tenant - of_tenant - would_wait) + 1
    for bound, subject, waiting, limit in (
        ("class", f"class {priority.name}", of_class, max_of_class),
        ("tenant", f"tenant {tenant} in class {priority.name}", of_tenant, max_of_tenant),
        ("caller", f"caller {caller} in class {priority.name}", load.num_waiting_of(caller, priority), max_of_caller),
        ("caller", f"caller {caller}", load.num_waiting_of(caller), limits.max_waiting_per_caller),
    ):
        limit = max(limit, 0)
        too_many = waiting + would_wait - limit
        first, again = subject, f"{subject} again"  # who came back in time and found no room goes before all others
        most = 0 if is_back else int(HELD_SHARE * limit)
        held = min(most, promises.num_held(first, now, most) + promises.num_held(again, now, most))
        if too_many + held > 0:
            if promise is not None and not is_back:
                retry_after_s: float | None = promise.due - now  # the client has come back too early
            else:
                ahead = promises.num_ahead(again, now) + (0 if is_back else promises.num_ahead(first, now))
                retry_after_s = _retry_after_s(load, priority, too_many, ahead)
                if retry_after_s is not None and key:
                    promises.make(key, again if is_back else first, would_wait, retry_after_s, now)
            raise QueueFullError(
                f"{waiting} of {limit} outputs of {subject} wait already, {would_wait} more would have to"
                + (f"; {held} places are kept for those who were told to come" if held else ""),
                metadata={"bound": bound, "subject": subject, "waiting": str(waiting), "limit": str(limit)},
                retry_after_s=retry_after_s,
            )


def _retry_after_s(load: Load, priority: Priority, too_many: int, ahead: int) -> float | None:
    """Seconds until there is room, after `ahead` other outputs; None: never, so many do not fit into an idle server.

    Each output that ends lets one that waits start, or leaves a slot free. The server ends `num_outputs / backlog_s`
    outputs a second. Of the slots that this frees a class gets its weight's share among the classes that have outputs.
    """
    if too_many > load.num_outputs:
        return None
    competing = [other for other in Priority if other is priority or load.num_outputs_of(other)]
    share = WEIGHTS[priority] / sum(WEIGHTS[other] for other in competing)
    seconds = max(1, too_many + ahead) * load.backlog_s() / max(1, load.num_outputs) / share
    return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(seconds * 10) / 10))
