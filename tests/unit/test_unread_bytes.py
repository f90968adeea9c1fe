"""Unread bytes are bounded: the tenant with most of them has its slowest stream ended, and no other is affected."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import QueueFullError, UnavailableError
from safelight_server.generations.open_streams import OpenStreams
from safelight_server.generations.unread_bytes import UnreadBytes

MAX_BYTES = 100
STALLED = UnavailableError("it was not read")


@dataclass(eq=False)
class Stream:
    """A stream whose client has not read a message since `since`."""

    since: float
    log: SimpleNamespace
    unread_bytes: int = 1

    def stalled_for(self, now: float) -> float:
        return now - self.since if self.unread_bytes else 0.0

    def close(self) -> None:
        self.log.watchers.discard(self)


@dataclass(eq=False)
class Held:
    """A generation, ended or running, with its streams."""

    tenant: str
    held_bytes: int
    ended: bool = True
    log: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(watchers=set()))

    @property
    def caller(self) -> Caller:
        return Caller("me", self.tenant)


@dataclass
class Suspended:
    """Suspended generations, and those that were cancelled."""

    held: dict[str, list[Held]] = field(default_factory=dict)
    abandoned: list[Held] = field(default_factory=list)
    may_decide: bool = True

    def by_tenant(self) -> dict[str, list[Held]]:
        return {tenant: list(held) for tenant, held in self.held.items()}

    def abandon(self, generation: Held, _why: str) -> None:
        generation.ended = self.may_decide
        self.abandoned.append(generation)


class Bench:
    """A bound of 100 bytes over streams and suspended generations."""

    def __init__(self) -> None:
        self.streams, self.suspended, self.live = OpenStreams(), Suspended(), []
        self.ended: list[Held] = []
        self.unread = UnreadBytes(MAX_BYTES, self.streams, self.suspended, self.end)

    def end(self, watcher) -> None:
        self.ended.append(self.streams.end(watcher, STALLED))

    def watch(self, generation: Held, since: float = 0.0, unread_bytes: int = 1) -> Stream:
        stream = Stream(since, generation.log, unread_bytes)
        generation.log.watchers.add(stream)
        self.streams.add(stream, generation, lambda _error: None)
        return stream

    def relieve(self) -> None:
        self.unread.relieve(self.live, 100.0)

    def held(self) -> int:
        generations = {*self.live, *self.streams.watched()}
        return sum(g.held_bytes for g in generations if not g.ended or g.log.watchers) + sum(
            size for _, _, size in self.streams.messages()
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_within_the_bound_nobody_is_ended_however_slow(bench):
    bench.watch(Held("lab", 49))
    bench.watch(Held("lab", 49))
    bench.relieve()
    assert not bench.ended
    bench.unread.check(Caller("me", "lab"))


def test_beyond_it_the_slowest_of_the_largest_tenant_is_ended(bench):
    bench.watch(Held("studio", 30), since=0.0)
    for since, size in ((9.0, 30), (5.0, 31), (7.0, 32)):
        bench.watch(Held("lab", size), since=since)
    bench.relieve()
    assert [generation.held_bytes for generation in bench.ended] == [31]
    assert bench.held() <= MAX_BYTES


def test_all_streams_of_one_generation_have_to_go_before_it_is_free(bench):
    shared = Held("lab", 60)
    for since in (1.0, 2.0):
        bench.watch(shared, since=since)
    bench.watch(Held("lab", 60), since=3.0)
    bench.relieve()
    assert bench.ended == [shared, shared]


def test_a_tenants_only_generation_is_delivered_however_large(bench):
    bench.watch(Held("lab", 1000))
    bench.relieve()
    assert not bench.ended
    with pytest.raises(QueueFullError) as refused:
        bench.unread.check(Caller("me", "lab"))
    assert refused.value.reason == "TOO_MANY_UNREAD_BYTES"
    bench.unread.check(Caller("me", "studio"))


def test_streams_of_what_runs_are_left_alone_and_the_oldest_suspended_ones_go(bench):
    running, lost = Held("lab", 60, ended=False), [Held("lab", 30, ended=False) for _ in range(3)]
    bench.watch(running)
    bench.live += [running, *lost]
    bench.suspended.held["lab"] = lost
    bench.relieve()
    assert not bench.ended
    assert bench.suspended.abandoned == lost[:2]


def test_what_may_not_be_decided_now_ends_the_loop_too(bench):
    lost = [Held("lab", 60, ended=False) for _ in range(3)]
    bench.live, bench.suspended.held["lab"], bench.suspended.may_decide = lost, lost, False
    bench.relieve()
    assert len(bench.suspended.abandoned) == 3


def test_messages_of_streams_that_were_ended_count_until_their_calls_end(bench):
    streams = [bench.watch(Held("lab", 1), unread_bytes=60) for _ in range(2)]
    bench.relieve()
    assert len(bench.ended) == 1
    with pytest.raises(QueueFullError):
        bench.unread.check(Caller("me", "lab"))
    for stream in streams:
        bench.streams.close(stream)
    bench.relieve()
    bench.unread.check(Caller("me", "lab"))


STREAM = st.tuples(st.sampled_from(["lab", "studio", "evil"]), st.integers(0, 80), st.floats(0, 50), st.booleans())


@given(opened=st.lists(STREAM, max_size=40))
def test_the_bound_holds_or_the_largest_is_refused_and_modest_tenants_lose_nothing(opened):
    bench = Bench()
    totals: dict[str, int] = {}
    for tenant, size, since, ended in opened:
        generation = Held(tenant, size, ended)
        bench.watch(generation, since)
        bench.live += [] if ended else [generation]
        totals[tenant] = totals.get(tenant, 0) + size + 1
    bench.relieve()
    modest = {tenant for tenant, total in totals.items() if total <= MAX_BYTES / len(totals)}
    assert not modest & {generation.tenant for generation in bench.ended}
    assert bench.held() <= MAX_BYTES or bench.unread._refused not in {None, *modest}
