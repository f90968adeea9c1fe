"""Ended generations that are kept: bounded in time, number and bytes, by shares of the tenants."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.domain.caller import Caller
from safelight_server.generations.finished import FinishedGenerations

from tests.support.streams import Clock

TTL_S, MAX_ENTRIES, MAX_BYTES = 10.0, 4, 100


@dataclass(eq=False)
class Ended:
    """The part of an ended generation that is used."""

    identifier: str
    tenant: str = "lab"
    held_bytes: int = 1
    ended_at: float = 0.0
    log: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(watchers=set()))

    @property
    def caller(self) -> Caller:
        return Caller("me", self.tenant)

    @property
    def times(self) -> SimpleNamespace:
        return SimpleNamespace(ended=self.ended_at)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def finished(clock: Clock) -> FinishedGenerations:
    return FinishedGenerations(TTL_S, MAX_ENTRIES, MAX_BYTES, clock)


def kept(finished) -> list[str]:
    return [generation.identifier for generation in finished.values()]


def test_the_time_runs_from_the_end_also_while_it_is_watched(finished, clock):
    finished.add(watched := Ended("a"))
    watched.log.watchers.add("one")
    finished.watched(watched)
    clock.now = TTL_S
    finished.add(Ended("b", ended_at=TTL_S))
    assert kept(finished) == ["a", "b"]
    clock.now += 0.1
    finished.trim()
    assert kept(finished) == ["b"]


def test_one_tenants_results_never_push_out_those_of_another_by_number(finished):
    finished.add(Ended("mine", "studio"))
    for name in "abcdef":
        finished.add(Ended(name))
    assert kept(finished) == ["mine", "d", "e", "f"]


def test_one_tenants_results_never_push_out_those_of_another_by_bytes(finished):
    finished.add(Ended("mine", "studio", held_bytes=50))
    finished.add(Ended("a", held_bytes=40))
    finished.add(Ended("b", held_bytes=40))
    assert kept(finished) == ["mine", "b"]


def test_what_is_watched_counts_in_bytes_once_its_last_stream_has_ended(finished):
    streams = {"one", "two"}
    finished.add(watched := Ended("a", held_bytes=60))
    watched.log.watchers = streams
    finished.watched(watched)
    finished.add(Ended("b", held_bytes=60))
    assert kept(finished) == ["a", "b"]
    for stream in ("one", "two"):
        assert kept(finished) == ["a", "b"]
        streams.remove(stream)
        finished.unwatched(watched)
        finished.trim()
    assert kept(finished) == ["a"], "b was not looked at for longer"


def test_by_number_what_is_watched_goes_last(finished):
    for number in range(MAX_ENTRIES):
        finished.add(watched := Ended(str(number)))
        watched.log.watchers.add("one")
        finished.watched(watched)
    finished.add(Ended("a"))
    assert "a" not in finished
    finished.add(watched := Ended("b", log=SimpleNamespace(watchers={"one"})))
    assert kept(finished) == ["1", "2", "3", "b"]


def test_one_that_another_replica_knows_better_leaves_no_share(finished):
    finished.add(one := Ended("a", held_bytes=MAX_BYTES))
    finished.remove(one)
    finished.unwatched(one)
    finished.add(Ended("b", held_bytes=MAX_BYTES))
    assert kept(finished) == ["b"]


def test_what_another_replica_knows_better_is_forgotten_with_its_bytes(finished):
    one, other = Ended("a", held_bytes=60), Ended("b", held_bytes=30)
    finished.add(one)
    finished.add(other)
    finished.remove(Ended("a"))  # of that name, and not the one that is kept
    assert finished.get("a") is one
    finished.remove(one)
    finished.remove(one)
    assert finished.get("a") is None
    finished.add(Ended("c", held_bytes=70))
    assert kept(finished) == ["b", "c"], "the bytes of what was forgotten are free"


ADDED = st.tuples(st.sampled_from(["lab", "studio", "evil"]), st.integers(1, 60), st.booleans())


@given(added=st.lists(ADDED, max_size=60))
def test_bounds_hold_and_modest_tenants_lose_nothing(added):
    finished = FinishedGenerations(TTL_S, 12, MAX_BYTES, Clock())
    totals = {tenant: (sum(t == tenant for t, _, _ in added), 0) for tenant, _, _ in added}
    for number, (tenant, size, is_watched) in enumerate(added):
        log = SimpleNamespace(watchers={"one"} if is_watched else set())
        finished.add(Ended(f"{tenant}{number}", tenant, size, log=log))
        totals[tenant] = totals[tenant][0], totals[tenant][1] + size
        assert len(finished) <= 12
        assert sum(one.held_bytes for one in finished.values() if not one.log.watchers) <= MAX_BYTES
    for tenant, (number, size) in totals.items():
        if number <= 12 / len(totals) and size <= MAX_BYTES / len(totals):
            assert sum(one.tenant == tenant for one in finished.values()) == number
