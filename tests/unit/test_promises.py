"""A refused caller gets a retry time after those of earlier ones, and finds a reserved place when it retries then."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.domain.errors import QueueFullError
from safelight_server.generations.admission import AdmissionLimits, admit
from safelight_server.generations.promises import GRACE_SHARE, MIN_GRACE_S, Promises
from safelight_server.scheduler import Kind, Priority, ScheduledOutput

LIMITS = AdmissionLimits(dict.fromkeys(Priority, 10), 100)
SUBJECT = "class STANDARD"
KEYS = {Kind.ENCODE: "e", Kind.DENOISE: "u", Kind.DECODE: "d"}
OUTPUT = ScheduledOutput(1, "lab/me", Priority.STANDARD, 20, 1, KEYS, ("p",))


@dataclass
class Moment:
    """A class that is full with many tenants' outputs, of which one ends each second."""

    waiting: int = 10

    num_free: int = 0

    @property
    def num_outputs(self) -> int:
        return self.waiting + 10

    def num_outputs_of(self, priority: Priority) -> int:
        return self.num_outputs if priority is Priority.STANDARD else 0

    def num_waiting(self, priority: Priority | None = None) -> int:
        return self.waiting

    def num_waiting_of(self, caller: str, priority: Priority | None = None) -> int:
        return 0

    def num_waiting_of_tenant(self, tenant: str, priority: Priority) -> int:
        return 0

    def backlog_s(self) -> float:
        return float(self.num_outputs)

    def estimate_s(self, output: ScheduledOutput, num_outputs: int = 1) -> float:
        return 1.0


@dataclass
class Room:
    """Requests admission at a time; None: admitted, else the retry time."""

    moment: Moment = field(default_factory=Moment)
    promises: Promises = field(default_factory=Promises)

    def ask(self, key: str, now: float) -> float | None:
        try:
            admit(self.moment, LIMITS, OUTPUT, 1, None, self.promises, key, now)
        except QueueFullError as refused:
            return refused.retry_after_s
        self.moment.waiting += 1
        return None


def test_each_is_told_a_later_time() -> None:
    room = Room()
    assert [room.ask(f"{number}", 0.0) for number in range(3)] == [1.0, 2.0, 3.0]


def test_who_comes_when_told_is_let_in_before_newcomers() -> None:
    room = Room()
    assert room.ask("first", 0.0) == 1.0
    room.moment.waiting = 9
    assert room.ask("newcomer", 1.0) is not None
    assert room.ask("first", 1.0) is None
    assert room.promises.num_held(SUBJECT, 1.0, 100) == 0


def test_who_comes_too_early_is_told_the_same_time() -> None:
    room = Room()
    room.ask("other", 0.0)
    assert room.ask("early", 0.0) == 2.0
    assert room.ask("early", 0.5) == 1.5


def test_who_comes_back_to_no_room_goes_to_no_ones_end() -> None:
    room = Room()
    for number in range(5):
        room.ask(f"{number}", 0.0)
    assert room.ask("0", 1.0) == 1.0, "it is the next one"
    assert room.ask("1", 2.0) == 2.0, "and this one comes after it"


def test_room_is_kept_for_a_while_and_never_all_of_it() -> None:
    room = Room()
    for number in range(10):
        room.promises.make(f"{number}", SUBJECT, 1, 4.0, 0.0)
    room.moment.waiting = 4
    assert room.ask("newcomer", 4.0) is None, "half is for newcomers"
    assert room.ask("another", 4.0) is not None
    room = Room()
    room.ask("gone", 0.0)
    room.moment.waiting = 9
    assert room.ask("newcomer", 1.0 + MIN_GRACE_S + 0.1) is None


def test_without_an_id_nothing_is_kept() -> None:
    room = Room()
    assert [room.ask("", 0.0), room.ask("", 0.0)] == [1.0, 1.0]
    assert len(room.promises) == 0


def test_the_oldest_are_forgotten() -> None:
    promises = Promises(max_promises=2)
    for number in range(3):
        promises.make(f"{number}", SUBJECT, 1, 10.0, 0.0)
    assert [promises.of(f"{number}", 0.0) is not None for number in range(3)] == [False, True, True]
    assert promises.num_ahead(SUBJECT, 0.0) == 2


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["make", "forget", "pass"]), st.integers(0, 5), st.floats(0.1, 50.0)), max_size=40
    )
)
def test_the_sums_are_those_of_the_promises(steps: list[tuple[str, int, float]]) -> None:
    promises, now, model = Promises(), 0.0, dict[str, tuple[int, float, float]]()
    for what, number, seconds in steps:
        key = f"{number}"
        if what == "make":
            grace_s = max(MIN_GRACE_S, GRACE_SHARE * seconds)
            model[key] = (number + 1, now + seconds, now + seconds + grace_s)
            promises.make(key, SUBJECT, number + 1, seconds, now)
        elif what == "forget":
            model.pop(key, None)
            promises.forget(key)
        else:
            now += seconds
        alive = {key: one for key, one in model.items() if one[2] >= now}
        assert promises.num_ahead(SUBJECT, now) == sum(one[0] for one in alive.values())
        assert promises.num_held(SUBJECT, now, 10_000) == sum(one[0] for one in alive.values() if one[1] <= now)
        for key, (num_outputs, due, _) in alive.items():
            promise = promises.of(key, now)
            assert promise is not None and (promise.num_outputs, promise.due) == (num_outputs, due)
    assert math.isfinite(now)


@pytest.mark.parametrize("grace", [True, False])
def test_a_promise_ends(grace: bool) -> None:
    promises = Promises()
    promises.make("a", SUBJECT, 1, 8.0, 0.0)
    assert (promises.of("a", 10.0 if grace else 10.1) is not None) is grace


def test_a_promise_ends_though_one_that_was_due_before_it_still_holds() -> None:
    promises = Promises()
    promises.make("long", SUBJECT, 1, 100.0, 0.0)  # due at 100 s, kept until 125 s
    promises.make("short", SUBJECT, 2, 2.0, 99.0)  # due at 101 s, kept until 102 s
    assert promises.num_ahead(SUBJECT, 102.0) == 3
    assert promises.num_ahead(SUBJECT, 103.0) == 1
    assert promises.num_held(SUBJECT, 103.0, 10) == 1
