"""A request id stands for one generation of its tenant: as long as it runs, and for a time after its end."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import AlreadyExistsError, QueueFullError
from safelight_server.generations.idempotency import Idempotency

ME, COLLEAGUE, STRANGER = Caller("me", "lab"), Caller("you", "lab"), Caller("me", "studio")
TTL_S = 10.0


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def requests(clock: Clock) -> Idempotency:
    return Idempotency(TTL_S, clock, max_entries=2)


def test_the_same_request_is_the_same_generation(requests: Idempotency) -> None:
    assert requests.find(ME, "id", b"body") is None
    requests.remember(ME, "id", b"body", "g1")
    assert requests.find(ME, "id", b"body") == "g1"
    assert requests.find(COLLEAGUE, "id", b"body") == "g1"


def test_another_body_is_refused(requests: Idempotency) -> None:
    requests.remember(ME, "id", b"body", "g1")
    with pytest.raises(AlreadyExistsError) as refused:
        requests.find(ME, "id", b"other")
    assert refused.value.reason == "REQUEST_ID_REUSED"
    assert refused.value.metadata == {"request_id": "id", "generation": "generations/g1"}
    requests.ended(ME, "id")
    with pytest.raises(AlreadyExistsError):
        requests.find(ME, "id", b"other")


def test_tenants_do_not_see_each_other(requests: Idempotency) -> None:
    requests.remember(ME, "id", b"body", "g1")
    assert requests.find(STRANGER, "id", b"other") is None


def test_the_time_runs_from_the_end(requests: Idempotency, clock: Clock) -> None:
    requests.remember(ME, "id", b"body", "g1")
    clock.now = 100 * TTL_S
    assert requests.find(ME, "id", b"body") == "g1"
    requests.ended(ME, "id")
    clock.now += TTL_S - 0.1
    assert requests.find(ME, "id", b"body") == "g1"
    clock.now += 0.1
    assert requests.find(ME, "id", b"body") is None
    assert len(requests) == 0


def test_a_released_id_can_be_used_again(requests: Idempotency) -> None:
    requests.remember(ME, "id", b"body", "g1")
    requests.release(ME, "id")
    assert requests.find(ME, "id", b"other") is None


def test_when_full_the_one_that_ended_first_makes_room(requests: Idempotency, clock: Clock) -> None:
    requests.remember(ME, "a", b"", "g1")
    requests.remember(ME, "b", b"", "g2")
    requests.ended(ME, "b")
    clock.now += 1
    requests.ended(ME, "a")
    requests.remember(ME, "c", b"", "g3")
    assert requests.find(ME, "b", b"") == "g2"
    requests.ended(ME, "c")
    assert requests.find(ME, "b", b"") is None
    assert requests.find(ME, "a", b"") == "g1"


def test_one_tenants_ids_never_push_out_those_of_another(requests: Idempotency) -> None:
    requests.remember(STRANGER, "mine", b"", "g0")
    requests.ended(STRANGER, "mine")
    for number in range(5):
        requests.remember(ME, str(number), b"", str(number))
        requests.ended(ME, str(number))
    assert requests.find(STRANGER, "mine", b"") == "g0"
    assert [requests.find(ME, str(number), b"") for number in range(5)] == [None] * 4 + ["4"]


def test_what_has_not_ended_never_makes_room(requests: Idempotency) -> None:
    requests.remember(ME, "a", b"", "g1")
    requests.remember(ME, "b", b"", "g2")
    with pytest.raises(QueueFullError) as refused:
        requests.remember(ME, "c", b"", "g3")
    assert refused.value.reason == "TOO_MANY_REQUEST_IDS"
    assert refused.value.retry_after_s == 1.0
    assert requests.find(ME, "a", b"") == "g1"


def test_unknown_ids_are_ignored(requests: Idempotency) -> None:
    requests.ended(ME, "x")
    requests.release(ME, "x")
    assert len(requests) == 0


IDS = st.sampled_from("abcdef")
MAX = 4


class Machine(RuleBasedStateMachine):
    """Whatever the order, an id that counts keeps its generation and the map stays bounded."""

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.requests = Idempotency(TTL_S, self.clock, max_entries=MAX)
        self.live: dict[str, str] = {}
        self.number = 0

    @rule(request_id=IDS)
    def call(self, request_id: str) -> None:
        known = self.requests.find(ME, request_id, b"")
        if request_id in self.live:
            assert known == self.live[request_id]
        if known is not None:
            return
        self.number += 1
        try:
            self.requests.remember(ME, request_id, b"", str(self.number))
        except QueueFullError:
            assert len(self.live) == MAX
        else:
            self.live[request_id] = str(self.number)

    @rule(request_id=IDS, lost=st.booleans())
    def end(self, request_id: str, lost: bool) -> None:
        (self.requests.release if lost else self.requests.ended)(ME, request_id)
        self.live.pop(request_id, None)

    @rule(seconds=st.floats(0, 2 * TTL_S))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def bounded(self) -> None:
        assert len(self.live) <= MAX
        assert len(self.live) <= len(self.requests) <= len(self.live) + MAX


TestMachine = Machine.TestCase
TestMachine.settings = settings(deadline=None, max_examples=50)


@pytest.mark.parametrize("ended", [False, True])
def test_what_another_replica_knows_better_is_forgotten(requests: Idempotency, *, ended: bool) -> None:
    requests.remember(ME, "id", b"body", "g1")
    if ended:
        requests.ended(ME, "id")
    requests.forget(ME, "id", "g2")
    requests.forget(STRANGER, "id", "g1")
    assert requests.find(ME, "id", b"body") == "g1", "it is not of that generation"
    requests.forget(COLLEAGUE, "id", "g1")
    assert requests.find(ME, "id", b"other") is None and len(requests) == 0
    requests.forget(ME, "id", "g1")
