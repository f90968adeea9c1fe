"""Admission: bounds hold exactly, refusals name the bound and a retry time, hopeless deadlines cost nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.domain.errors import DeadlineUnreachableError, QueueFullError
from safelight_server.generations.admission import MAX_RETRY_S, MIN_RETRY_S, AdmissionLimits, Load
from safelight_server.generations.admission import admit as admit_with
from safelight_server.generations.promises import Promises
from safelight_server.scheduler import Kind, Limits, Priority, ScheduledOutput, Scheduler

KEYS = {Kind.ENCODE: "e", Kind.DENOISE: "u", Kind.DECODE: "d"}
LIMITS = AdmissionLimits({Priority.INTERACTIVE: 4, Priority.STANDARD: 6, Priority.BATCH: 8}, 5)
WIDE = AdmissionLimits(dict.fromkeys(Priority, 60), 5)


@dataclass
class Moment:
    """A snapshot of the queue's numbers."""

    num_outputs: int = 10
    num_free: int = 0
    waiting: dict[Priority, int] = field(default_factory=dict)
    waiting_of_caller: int = 0
    waiting_of_tenant: int = 0
    backlog: float = 20.0
    estimate: float = 3.0

    def num_outputs_of(self, priority: Priority) -> int:
        return self.waiting.get(priority, 0)

    def num_waiting(self, priority: Priority | None = None) -> int:
        return sum(self.waiting.values()) if priority is None else self.waiting.get(priority, 0)

    def num_waiting_of(self, caller: str, priority: Priority | None = None) -> int:
        assert caller == "lab/me"
        return self.waiting_of_caller if priority is None else min(self.waiting_of_caller, self.waiting_of_tenant)

    def num_waiting_of_tenant(self, tenant: str, priority: Priority) -> int:
        assert tenant == "lab"
        return self.waiting_of_tenant

    def backlog_s(self) -> float:
        return self.backlog

    def estimate_s(self, output: ScheduledOutput, num_outputs: int = 1) -> float:
        return self.estimate * num_outputs


def admit(
    load: Load, limits: AdmissionLimits, output: ScheduledOutput, num_outputs: int, time_left_s: float | None
) -> float:
    """Decides without earlier promises."""
    return admit_with(load, limits, output, num_outputs, time_left_s, Promises(), "", 0.0)


def output(priority: Priority = Priority.STANDARD, steps: int = 20) -> ScheduledOutput:
    return ScheduledOutput(1, "lab/me", priority, steps, 2, KEYS, ("p", "n"))


def test_what_has_room_is_let_in_with_its_estimate() -> None:
    assert admit(Moment(), LIMITS, output(), 2, None) == 6.0


@pytest.mark.parametrize(("priority", "limit"), [(p, LIMITS.max_waiting[p]) for p in Priority])
def test_a_class_is_bounded_to_the_output(priority: Priority, limit: int) -> None:
    admit(Moment(waiting={priority: limit - 1}), LIMITS, output(priority), 1, None)
    with pytest.raises(QueueFullError) as refused:
        admit(Moment(waiting={priority: limit}), LIMITS, output(priority), 1, None)
    assert refused.value.metadata == {
        "bound": "class",
        "subject": f"class {priority.name}",
        "waiting": str(limit),
        "limit": str(limit),
    }
    assert refused.value.reason == "QUEUE_FULL"


def test_a_caller_is_bounded_to_the_output() -> None:
    admit(Moment(waiting_of_caller=3), WIDE, output(), 2, None)
    with pytest.raises(QueueFullError) as refused:
        admit(Moment(waiting_of_caller=4), WIDE, output(), 2, None)
    assert refused.value.metadata["bound"] == "caller"
    assert refused.value.metadata["subject"] == "caller lab/me"


def test_another_class_leaves_room() -> None:
    admit(Moment(waiting={Priority.BATCH: 8}), LIMITS, output(Priority.INTERACTIVE), 1, None)


def test_a_tenant_may_hold_twice_what_it_leaves_free() -> None:
    full = Moment(waiting={Priority.STANDARD: 39}, waiting_of_tenant=39)
    admit(full, WIDE, output(), 1, None)  # 40 of 60, 20 are left
    with pytest.raises(QueueFullError) as refused:
        admit(full, WIDE, output(), 3, None)
    assert refused.value.metadata["bound"] == "tenant"
    assert refused.value.metadata["subject"] == "tenant lab in class STANDARD"
    admit(Moment(waiting={Priority.STANDARD: 39}), WIDE, output(), 3, None)  # another tenant is admitted


def test_a_caller_leaves_room_to_its_tenants_other_callers() -> None:
    limits = AdmissionLimits(dict.fromkeys(Priority, 60), 60)
    at = Moment(waiting={Priority.STANDARD: 34}, waiting_of_tenant=34, waiting_of_caller=34)
    with pytest.raises(QueueFullError) as refused:
        admit(at, limits, output(), 1, None)
    assert refused.value.metadata["subject"] == "caller lab/me in class STANDARD"
    admit(Moment(waiting={Priority.STANDARD: 34}, waiting_of_tenant=34), limits, output(), 1, None)


def test_what_starts_at_once_does_not_wait() -> None:
    full = {Priority.STANDARD: 6}
    admit(Moment(num_free=2, waiting=full, waiting_of_caller=5), LIMITS, output(), 2, None)
    with pytest.raises(QueueFullError):
        admit(Moment(num_free=2, waiting=full), LIMITS, output(), 3, None)


def test_the_retry_comes_when_the_backlog_has_made_room() -> None:
    """10 outputs in 20 s are one every 2 s, all for the only waiting class."""
    with pytest.raises(QueueFullError) as refused:
        admit(Moment(waiting={Priority.STANDARD: 5}), LIMITS, output(), 3, None)
    assert refused.value.retry_after_s == 4.0


def test_a_class_gets_its_weight_of_what_is_freed() -> None:
    waiting = {Priority.INTERACTIVE: 1, Priority.STANDARD: 5}
    with pytest.raises(QueueFullError) as refused:
        admit(Moment(waiting=waiting), LIMITS, output(), 3, None)
    assert refused.value.retry_after_s == 12.0  # 4 of 12 starts


def test_no_retry_is_promised_to_what_never_fits() -> None:
    with pytest.raises(QueueFullError) as refused:
        admit(Moment(num_outputs=0, num_free=1), LIMITS, output(), 8, None)
    assert refused.value.retry_after_s is None


@given(
    backlog=st.floats(0, 1e6),
    outputs=st.integers(1, 1000),
    waiting=st.integers(6, 1000),
    count=st.integers(1, 8),
    others=st.integers(0, 10),
)
def test_a_retry_is_within_bounds(backlog: float, outputs: int, waiting: int, count: int, others: int) -> None:
    moment = Moment(outputs, 0, {Priority.STANDARD: waiting, Priority.BATCH: others}, 0, backlog)
    with pytest.raises(QueueFullError) as refused:
        admit(moment, LIMITS, output(), count, None)
    after = refused.value.retry_after_s
    assert after is None if waiting + count - 6 > outputs else MIN_RETRY_S <= (after or 0) <= MAX_RETRY_S


def test_a_deadline_that_cannot_be_met_is_refused() -> None:
    assert admit(Moment(), LIMITS, output(), 2, 6.0) == 6.0
    with pytest.raises(DeadlineUnreachableError) as refused:
        admit(Moment(), LIMITS, output(), 2, 5.99)
    assert refused.value.reason == "DEADLINE_UNREACHABLE"
    assert refused.value.metadata == {"needed_s": "6.000", "available_s": "5.990"}
    assert refused.value.retry_after_s is None


def test_a_deadline_that_has_passed_leaves_nothing() -> None:
    with pytest.raises(DeadlineUnreachableError) as refused:
        admit(Moment(), LIMITS, output(), 1, -1.0)
    assert refused.value.metadata["available_s"] == "0.000"


def test_a_full_queue_is_said_before_a_short_deadline() -> None:
    with pytest.raises(QueueFullError):
        admit(Moment(waiting={Priority.STANDARD: 6}), LIMITS, output(), 1, 0.001)


class Curve:
    """A call costs 20 + 1 a row."""

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        return 20.0 + rows


def scheduler(max_running: int = 2) -> Scheduler:
    return Scheduler(Limits(max_running, lambda kind, key: 8, 1), Curve())


def test_the_scheduler_has_the_numbers() -> None:
    """Outputs that are admitted one by one fill slots and bounds exactly."""
    at, admitted = scheduler(), 0
    while True:
        new = ScheduledOutput(admitted, "lab/me", Priority.STANDARD, 4, 2, KEYS, ("p", "n"))
        try:
            admit(at, WIDE, new, 1, None)
        except QueueFullError as error:
            assert error.metadata["bound"] == "caller"
            assert error.retry_after_s
            break
        at.add(new, 0.0)
        admitted += 1
        at.schedule(0.0, [])
    assert admitted == 2 + WIDE.max_waiting_per_caller


def test_an_estimate_grows_with_load_and_with_outputs() -> None:
    at = scheduler()
    one, two, three = (at.estimate_s(output(), n) for n in (1, 2, 3))
    # encode both prompts, 20 steps of two rows, decode
    assert one == pytest.approx(22 + 20 * 22 + 21)
    assert one < two < three
    at.add(ScheduledOutput(7, "lab/you", Priority.STANDARD, 20, 2, KEYS, ("q", "n")), 0.0)
    at.schedule(0.0, [0])
    assert at.estimate_s(output()) >= one
    assert at.estimate_s(output(), 2) > two  # only one slot is free


def test_the_backlog_is_what_the_slots_can_make_of_it() -> None:
    """One slot and three outputs of 20 steps of two rows: 60 calls of 22, whatever the largest batch is."""
    at = scheduler(max_running=1)
    for number in range(3):
        at.add(ScheduledOutput(number, "lab/me", Priority.STANDARD, 20, 2, KEYS, ("p", "n")), 0.0)
    assert at.backlog_s() == pytest.approx(60 * 22)


def test_other_callers_work_does_not_make_a_deadline_hopeless() -> None:
    """64 outputs of 1,000 steps of another caller, in any class: this caller gets its share of the time beside them."""
    ours = ScheduledOutput(999, "lab/me", Priority.STANDARD, 10, 2, KEYS, ("p", "n"))
    alone_s = scheduler(max_running=16).estimate_s(ours)
    for priority in Priority:
        at = scheduler(max_running=16)
        for number in range(64):
            at.add(ScheduledOutput(number, "evil/one", priority, 1000, 2, KEYS, ("q", "n")), 0.0)
        at.schedule(0.0, [0])
        assert alone_s <= at.estimate_s(ours) < 20 * alone_s


def test_ones_own_work_comes_first() -> None:
    ours = ScheduledOutput(999, "lab/me", Priority.STANDARD, 10, 2, KEYS, ("p", "n"))
    at = scheduler(max_running=16)
    for number in range(64):
        at.add(ScheduledOutput(number, "lab/me", Priority.STANDARD, 1000, 2, KEYS, ("q", "n")), 0.0)
    assert at.estimate_s(ours) > 0.9 * at.backlog_s()


def test_rows_that_are_not_evaluated_are_in_no_estimate() -> None:
    """Guidance in 12 of 20 steps: 12 calls of two rows and 8 of one. A row of a full batch of 8 takes 3.5."""
    limited = replace(output(), guided_steps=range(4, 16))
    at = scheduler()
    assert at.estimate_s(limited) == pytest.approx(22 + 12 * 22 + 8 * 21 + 21)
    assert at.compute_s(limited) == pytest.approx((2 + 32 + 1) * 3.5)
    assert at.compute_s(replace(limited, first_step=10)) == pytest.approx((2 + 16 + 1) * 3.5)
    at.add(limited, 0.0)
    assert at.backlog_s() == pytest.approx(12 * 22 + 8 * 21)
    assert at.left_by_class_s()[Priority.STANDARD] == pytest.approx(at.compute_s(limited))


def test_an_estimate_counts_the_rows_that_others_have_now() -> None:
    """Beside an output in a step of one row, a call has three rows; with two rows it would have four."""
    for guided, rows in ((range(10, 20), 3), (None, 4)):
        at = scheduler()
        beside = ScheduledOutput(7, "lab/you", Priority.STANDARD, 20, 2, KEYS, (), guided_steps=guided)
        at.add(beside, 0.0)
        at.schedule(0.0, [0])
        assert at.estimate_s(output()) == pytest.approx(22 + 20 * (20 + rows) + 21)
