"""A waiting output starts within the bounds that `waiting.py` states, whatever else arrives, ends or moves."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from safelight_server.scheduler import WEIGHTS, Kind, Priority, ScheduledOutput
from safelight_server.scheduler.waiting import WaitingQueue

KEYS = {Kind.ENCODE: "e", Kind.DENOISE: "u", Kind.DECODE: "d"}
DEADLINES = st.one_of(st.none(), st.integers(0, 5).map(float))


@dataclass
class Waiter:
    """A waiting output, and the grants to others since it came into its class."""

    caller: str
    priority: Priority
    place: tuple[float, int]
    to_class: Counter[Priority] = field(default_factory=Counter)
    to_caller: Counter[str] = field(default_factory=Counter)


class Machine(RuleBasedStateMachine):
    """Records every grant."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.waiters: dict[int, Waiter] = {}
        self.num_pushed = 0

    @rule(caller=st.sampled_from("abc"), priority=st.sampled_from(list(Priority)), deadline=DEADLINES)
    def push(self, caller, priority, deadline) -> None:
        output_id = self.num_pushed
        self.queue.push(waiting(output_id, caller, priority), priority, deadline, output_id)
        self.waiters[output_id] = Waiter(caller, priority, (late(deadline), output_id))
        self.num_pushed += 1

    @rule(times=st.integers(1, 12))
    def pop(self, times) -> None:
        for _ in range(min(times, len(self.waiters))):
            heads = {priority: self.queue.order(priority)[:1] for priority in Priority}
            output = self.queue.pop()
            assert output is not None, "some wait, none starts"
            granted = self.waiters.pop(output.output_id)
            assert heads[granted.priority] == [output.output_id], "not the order that was announced"
            for waiter in self.waiters.values():
                self.judge(waiter, granted)

    def judge(self, waiter: Waiter, granted: Waiter) -> None:
        waiter.to_class[granted.priority] += 1
        if granted.priority is waiter.priority:
            waiter.to_caller[granted.caller] += 1
            if granted.caller == waiter.caller:
                assert granted.place < waiter.place, "the caller's earliest deadline goes first"
        own = waiter.to_class[waiter.priority] + 1  # its own grant is still to come
        for other, weight in WEIGHTS.items():
            if other is not waiter.priority:
                assert waiter.to_class[other] <= math.floor(own * weight / WEIGHTS[waiter.priority]) + 1
        for caller, grants in waiter.to_caller.items():
            if caller != waiter.caller:
                assert grants <= waiter.to_caller[waiter.caller] + 1, "callers take turns"

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def remove(self, data) -> None:
        output_id = data.draw(st.sampled_from(sorted(self.waiters)))
        self.queue.remove(output_id)
        del self.waiters[output_id]

    @precondition(lambda self: self.waiters)
    @rule(data=st.data(), priority=st.sampled_from(list(Priority)))
    def set_priority(self, data, priority) -> None:
        output_id = data.draw(st.sampled_from(sorted(self.waiters)))
        self.queue.set_priority(output_id, priority)
        old = self.waiters[output_id]
        if old.priority is not priority:
            self.waiters[output_id] = Waiter(old.caller, priority, old.place)

    @precondition(lambda self: self.waiters)
    @rule(data=st.data(), deadline=DEADLINES)
    def set_deadline(self, data, deadline) -> None:
        output_id = data.draw(st.sampled_from(sorted(self.waiters)))
        self.queue.set_deadline(output_id, deadline)
        self.waiters[output_id].place = (late(deadline), output_id)

    def teardown(self) -> None:
        for priority in Priority:
            mine = [waiter for waiter in self.waiters.values() if waiter.priority is priority]
            assert self.queue.count(priority) == len(mine) == len(self.queue.order(priority))
        for caller in "abc":
            assert self.queue.count_caller(caller) == sum(w.caller == caller for w in self.waiters.values())
        self.pop(len(self.waiters))
        assert self.queue.pop() is None
        assert len(self.queue) == 0


def waiting(output_id: int, caller: str, priority: Priority) -> ScheduledOutput:
    return ScheduledOutput(output_id, caller, priority, 1, 1, KEYS, ("p",))


def late(deadline: float | None) -> float:
    return math.inf if deadline is None else deadline


TestWaiting = Machine.TestCase
TestWaiting.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_class_that_ran_alone_is_not_made_to_wait_for_it():
    queue = WaitingQueue()
    for output_id in range(50):
        queue.push(waiting(output_id, "a", Priority.INTERACTIVE), Priority.INTERACTIVE, None, output_id)
        queue.pop()
    for output_id in range(100, 120):
        queue.push(waiting(output_id, "a", Priority.STANDARD), Priority.STANDARD, None, output_id)
    queue.push(waiting(200, "a", Priority.INTERACTIVE), Priority.INTERACTIVE, None, 200)
    assert 200 in [queue.pop().output_id for _ in range(2)]
