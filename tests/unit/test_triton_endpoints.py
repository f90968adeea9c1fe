"""Ejection, probes and least outstanding work, by hand and against a model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safelight_server.runtime.triton.endpoints import Backoff, Endpoints, EndpointState


def up(count: int = 2, calls_each: int = 2) -> Endpoints:
    """All endpoints UP; waits are not shortened by chance."""
    endpoints = Endpoints(count, calls_each, Backoff(0.1, 0.8), lambda: 1.0)
    for at in endpoints.probe(0.0):
        endpoints.probed(at, True, 0.0)
    return endpoints


def test_nothing_is_offered_before_a_probe_has_succeeded():
    endpoints = Endpoints(2, 1, Backoff(), lambda: 0.0)
    assert endpoints.usable({0, 1}) == []
    assert endpoints.probe(0.0) == [0, 1]
    assert endpoints.probe(0.0) == []  # both are being probed
    endpoints.probed(1, True, 0.0)
    assert endpoints.usable({0, 1}) == [1]
    assert endpoints.num_live == 1


def test_the_endpoint_with_the_least_work_comes_first():
    endpoints = up()
    endpoints.begin(0, 5.0)
    endpoints.begin(2, 1.0)
    assert endpoints.usable({1, 3}) == [3, 1]
    assert [at // 2 for at in up().usable({0, 1, 2, 3})] == [0, 1, 0, 1]  # in turns, when they are equal


def test_a_failure_ejects_at_once_and_probes_wait_longer_each_time():
    endpoints = up()
    ticket = endpoints.begin(0, 1.0)
    assert endpoints.eject(ticket, 10.0)
    assert endpoints.state(0) is EndpointState.DOWN
    assert endpoints.usable({1, 2, 3}) == [2, 3]
    due = []
    now = 10.0
    for _ in range(5):
        due.append(round(endpoints.next_probe() - now, 3))
        now = endpoints.next_probe()
        assert endpoints.probe(now - 1e-6) == []
        assert endpoints.probe(now) == [0]
        endpoints.probed(0, False, now)
    assert due == [0.1, 0.2, 0.4, 0.8, 0.8]


def test_the_wait_is_forgotten_only_when_a_call_has_succeeded():
    endpoints = up(1)
    waits = []
    for trusted in (False, False, True, False):
        now = 100.0
        endpoints.eject(endpoints.begin(0, 1.0), now)
        waits.append(round(endpoints.next_probe() - now, 3))
        endpoints.probe(now + 9)
        endpoints.probed(0, True, now + 9)
        if trusted:
            endpoints.succeeded(endpoints.begin(1, 1.0))
    assert waits == [0.1, 0.2, 0.4, 0.1]


def test_a_late_failure_says_nothing_about_a_server_that_has_returned():
    endpoints = up(1)
    first, second = endpoints.begin(0, 1.0), endpoints.begin(1, 1.0)
    assert endpoints.eject(first, 1.0)
    endpoints.probe(9.0)
    endpoints.probed(0, True, 9.0)
    assert not endpoints.eject(second, 9.5)
    assert not endpoints.refused(second, 9.5)
    assert endpoints.num_live == 2


def test_a_full_queue_narrows_what_is_given_at_once_and_successes_widen_it():
    endpoints = up(1, 6)
    tickets = [endpoints.begin(at, 1.0) for at in range(6)]
    for ticket in tickets[2:]:
        endpoints.end(ticket)
        assert not endpoints.refused(ticket, 1.0)
    assert endpoints.num_live == 6  # it is not down
    endpoints.end(tickets[0])
    assert endpoints.usable({0, 2, 3, 4, 5}) == [0]  # two at once
    for _ in range(19):
        endpoints.succeeded(tickets[0])
    assert len(endpoints.usable({0, 2, 3, 4, 5})) == 1
    endpoints.succeeded(tickets[0])
    endpoints.succeeded(tickets[0])
    assert len(endpoints.usable({0, 2, 3, 4, 5})) == 2


def test_a_server_that_refuses_a_call_given_alone_is_down():
    endpoints = up(1, 6)
    ticket = endpoints.begin(0, 1.0)
    endpoints.end(ticket)
    assert endpoints.refused(ticket, 1.0)
    assert endpoints.num_live == 0


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("other_ends_first", [False, True])
def test_a_call_refused_beside_another_is_no_dead_server_whichever_began_first(refused, other_ends_first):
    endpoints = up(1, 6)
    tickets = [endpoints.begin(at, 1.0) for at in range(2)]  # they may arrive in either order
    other = tickets[1 - refused]
    if other_ends_first:
        endpoints.end(other)
        endpoints.succeeded(other)
    endpoints.end(tickets[refused])
    assert not endpoints.refused(tickets[refused], 1.0)
    assert endpoints.num_live == 6
    assert len(endpoints.usable({2, 3, 4, 5})) == (1 if other_ends_first else 0)  # one at once


def test_only_what_is_being_probed_can_be_probed():
    with pytest.raises(ValueError, match="not being probed"):
        up().probed(0, True, 0.0)


class Life(RuleBasedStateMachine):
    """Calls and failures in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.endpoints = Endpoints(3, 2, Backoff(0.1, 0.8), lambda: 0.5)
        self.calls = {}

    @rule(seconds=st.sampled_from((0.01, 0.05, 0.3)))
    def time_passes(self, seconds):
        self.now += seconds
        for at in self.endpoints.probe(self.now):
            self.endpoints.probed(at, (int(self.now * 100) + at) % 2 == 0, self.now)

    @rule(work_s=st.floats(0.001, 1.0))
    def call(self, work_s):
        free = set(range(self.endpoints.num_instances)) - set(self.calls)
        order = self.endpoints.usable(free)
        assert set(order) <= free
        assert all(self.endpoints.state(self.endpoints.endpoint_of(at)) is EndpointState.UP for at in order)
        if order:
            self.calls[order[0]] = self.endpoints.begin(order[0], work_s)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), outcome=st.sampled_from(("succeeded", "eject", "refused")))
    def back(self, data, outcome):
        instance = data.draw(st.sampled_from(sorted(self.calls)))
        ticket = self.calls.pop(instance)
        self.endpoints.end(ticket)
        if outcome == "succeeded":
            self.endpoints.succeeded(ticket)
        else:
            getattr(self.endpoints, outcome)(ticket, self.now)

    @invariant()
    def counts(self):
        per_endpoint = [0, 0, 0]
        for instance in self.calls:
            per_endpoint[self.endpoints.endpoint_of(instance)] += 1
        assert [self.endpoints.num_calls(at) for at in range(3)] == per_endpoint
        down = [at for at in range(3) if self.endpoints.state(at) is EndpointState.DOWN]
        assert (self.endpoints.next_probe() is not None) == bool(down)  # whoever is down is looked at again
        assert self.endpoints.num_live == 2 * (3 - len(down))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
