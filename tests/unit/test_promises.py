"""A refused caller gets a retry time after those of earlier ones, and finds a reserved place when it retries then."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.domain.errors import QueueFullError
from safelight_server.generations.admission import HELD_SHARE, PROMISED_SHARE, Admission, AdmissionLimits
from safelight_server.generations.promises import GRACE_SHARE, MIN_GRACE_S, Promises
from safelight_server.scheduler import Kind, Priority, ScheduledOutput

LIMITS = AdmissionLimits(dict.fromkeys(Priority, 10), 100)
SUBJECT = "class STANDARD"
KEYS = {Kind.ENCODE: "e", Kind.DENOISE: "u", Kind.DECODE: "d"}
OUTPUT = ScheduledOutput(1, "lab/me", Priority.STANDARD, 20, 1, KEYS, ("p",))


@dataclass
class Moment:
    """A class that many tenants fill, of whose outputs so many end that one place is promised for each second."""

    waiting: int = 10
    num_free: int = 0
    num_ended: int = 0
    num_callers: int = 1

    @property
    def num_outputs(self) -> int:
        return self.waiting + 10

    def num_outputs_of(self, priority: Priority) -> int:
        return self.num_outputs if priority is Priority.STANDARD else 0

    def num_ended_of(self, priority: Priority) -> int:
        return self.num_ended

    def num_callers_waiting(self, priority: Priority, tenant: str | None = None) -> int:
        return self.num_callers if tenant is None else 1

    def num_waiting(self, priority: Priority | None = None) -> int:
        return self.waiting

    def num_waiting_of(self, caller: str, priority: Priority | None = None) -> int:
        return 0

    def num_waiting_of_tenant(self, tenant: str, priority: Priority) -> int:
        return 0

    def backlog_s(self) -> float:
        return PROMISED_SHARE * self.num_outputs

    def estimate_s(self, output: ScheduledOutput, num_outputs: int = 1) -> float:
        return 1.0


@dataclass
class Room:
    """Requests admission at a time; None: admitted, else the retry time."""

    moment: Moment = field(default_factory=Moment)
    admission: Admission = field(default_factory=lambda: Admission(LIMITS))

    @property
    def promises(self) -> Promises:
        return self.admission.promises

    def ask(self, key: str, now: float, num_outputs: int = 1) -> float | None:
        try:
            self.admission.admit(self.moment, OUTPUT, num_outputs, None, key, now)
        except QueueFullError as refused:
            return refused.retry_after_s
        self.moment.waiting += num_outputs
        return None

    def end(self) -> None:
        """One output ends, and one that waited starts."""
        self.moment.num_ended += 1
        self.moment.waiting -= 1


def test_each_is_told_a_later_time() -> None:
    room = Room()
    assert [room.ask(f"{number}", 0.0) for number in range(3)] == pytest.approx([1.0, 2.0, 3.0])


def test_who_comes_when_told_is_let_in_before_newcomers() -> None:
    room = Room()
    assert room.ask("first", 0.0) == pytest.approx(1.0)
    room.moment.waiting = 9
    assert room.ask("newcomer", 1.0) is not None
    assert room.ask("first", 1.0) is None
    assert room.promises.num_held(SUBJECT, 1.0, 1.0, 100) == 0


def test_a_place_is_kept_from_when_it_becomes_free_for_who_is_due_later() -> None:
    """Otherwise newcomers take each place in the moment before the client comes for whom it became free."""
    room = Room()
    assert [room.ask(f"{number}", 0.0) for number in range(3)] == pytest.approx([1.0, 2.0, 3.0])
    room.end()
    told = room.ask("newcomer", 0.5)
    assert told is not None
    assert told > 2.5, "after those three"
    assert room.ask("0", 1.0) is None


def test_what_becomes_free_sooner_than_it_was_told_is_for_newcomers_too() -> None:
    room = Room()
    for number in range(3):
        room.ask(f"{number}", 0.0)
    for _ in range(4):
        room.end()
    assert room.ask("newcomer", 0.5) is None, "three places of the four are kept"
    assert room.ask("another", 0.5) is not None
    assert [room.ask(f"{number}", number + 1.0) for number in range(3)] == [None, None, None]


def test_no_place_is_kept_for_who_is_due_when_as_many_are_free() -> None:
    """Half of ten places are free after five seconds: who is due after that finds its place then."""
    room = Room()
    room.promises.make("later", SUBJECT, 1, 5.5, 0.0)
    room.moment.waiting = 9
    assert room.ask("newcomer", 0.0) is None


def test_who_comes_too_early_to_free_places_that_are_not_kept_for_others_is_let_in() -> None:
    room = Room()
    room.ask("early", 0.0)
    room.end()
    assert room.ask("early", 0.3) is None


def test_who_comes_too_early_is_told_the_same_time() -> None:
    room = Room()
    room.ask("other", 0.0)
    assert room.ask("early", 0.0) == pytest.approx(2.0)
    assert room.ask("early", 0.5) == pytest.approx(1.5)


def test_who_comes_back_to_no_room_goes_to_no_ones_end() -> None:
    room = Room()
    for number in range(5):
        room.ask(f"{number}", 0.0)
    room.moment.num_ended = 1
    assert room.ask("0", 1.0) == pytest.approx(1.0, abs=0.1), "it is the next one"
    room.moment.num_ended = 2
    assert room.ask("1", 2.0) == pytest.approx(2.0, abs=0.1), "and this one comes after it"


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
    assert [room.ask("", 0.0), room.ask("", 0.0)] == pytest.approx([1.0, 1.0])
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
        assert promises.num_held(SUBJECT, now, now, 10_000) == sum(one[0] for one in alive.values() if one[1] <= now)
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
    assert promises.num_held(SUBJECT, 103.0, 103.0, 10) == 1


def test_the_time_follows_what_was_seen_to_end() -> None:
    """By the cost curves one output ends in a second. Five a second end, for five seconds."""
    room = Room()
    for tick in range(25):
        room.ask(f"{tick}", 0.2 * tick)
        room.end()
        room.moment.waiting = 10
    for tick in range(25):
        room.promises.forget(f"{tick}")
    told = room.ask("now", 5.0)
    assert told is not None
    assert 0.22 < told < 0.45, "25 were seen in 5 s, and the expectation weighs as 8"


def test_what_ends_while_none_waits_says_nothing() -> None:
    room = Room()
    room.moment.waiting = 0
    for tick in range(50):
        room.ask("", 0.1 * tick)
        room.moment.num_ended += 1
        room.moment.waiting = 0
    room.moment.waiting = 10
    assert room.ask("now", 5.0) == pytest.approx(1.0)


@pytest.mark.parametrize(("seconds", "told"), [(0.001, 0.25), (1000.0, 4.0)])
def test_a_measurement_is_within_four_times_the_expectation(seconds: float, told: float) -> None:
    room = Room()
    for tick in range(65):
        room.ask("", seconds * tick)
        room.moment.num_ended += 1
    assert room.ask("now", seconds * 65) == pytest.approx(told)


def test_callers_that_wait_share_what_ends() -> None:
    """Of three callers of a class each gets a third of what ends: so it takes three times as long."""
    room = Room(Moment(waiting=0, num_callers=3))
    ours = dataclasses.replace(OUTPUT, caller="lab/one")
    limits = AdmissionLimits(dict.fromkeys(Priority, 10), 2)
    with pytest.raises(QueueFullError) as refused:
        Admission(limits).admit(room.moment, ours, 3, None, "", 0.0)
    assert refused.value.metadata["subject"] == "caller lab/one"
    assert refused.value.retry_after_s == pytest.approx(3.0)


def test_half_is_kept_at_most_of_what_a_lone_caller_may_hold() -> None:
    """Not of the room of its class: a lone caller may have a part of that only."""

    class Alone(Moment):
        def num_waiting_of(self, caller: str, priority: Priority | None = None) -> int:
            return self.waiting

        def num_waiting_of_tenant(self, tenant: str, priority: Priority) -> int:
            return self.waiting

    limits = AdmissionLimits(dict.fromkeys(Priority, 64), 1024)
    admission, moment = Admission(limits), Alone(waiting=0)
    while True:
        try:
            admission.admit(moment, OUTPUT, 1, None, "", 0.0)
        except QueueFullError as refused:
            assert int(refused.metadata["limit"]) == moment.waiting
            break
        moment.waiting += 1
    bound = moment.waiting
    for number in range(bound):
        admission.promises.make(f"{number}", "caller lab/me in class STANDARD", 1, 0.5, 0.0)
    moment.waiting = bound - int(HELD_SHARE * bound) - 1
    admission.admit(moment, OUTPUT, 1, None, "", 0.5)
    moment.waiting += 1
    with pytest.raises(QueueFullError):
        admission.admit(moment, OUTPUT, 1, None, "", 0.5)


def test_times_do_not_overlap_when_more_ends_than_was_expected() -> None:
    """Ten were told times by what was expected. Who is told now comes after them, however much ends now."""
    room = Room()
    for number in range(10):
        room.ask(f"{number}", 0.0)
    for tick in range(1, 21):
        room.moment.num_ended += 2
        room.ask("", 0.1 * tick)
    told = room.ask("now", 2.0)
    assert told is not None
    assert told > 8.0, "the tenth comes at ten seconds"
