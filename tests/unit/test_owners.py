"""The owner of a generation: who may take over its request id, and what it does at the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from safelight_server.cluster import journal_rules
from safelight_server.coordination.base import Lease, StreamEvent
from safelight_server.coordination.leadership import Leadership
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import AlreadyExistsError, UnavailableError
from safelight_server.domain.events import Durability
from safelight_server.domain.request import (
    CacheMode,
    CachePolicy,
    DisconnectPolicy,
    MediaType,
    PixelEncoding,
    PreviewPolicy,
    Request,
)
from safelight_server.generations.generation import Generation
from safelight_server.generations.ownership import ClusterContext, owners, rules
from safelight_server.generations.ownership.owners import OwnedGeneration, Owners
from safelight_server.scheduler import Priority
from safelight_server.storage.base import StoreUnavailableError
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import Sealer
from safelight_server.stream import EventLog
from safelight_server.telemetry.tracing import UNTRACED

from tests.conftest import eventually
from tests.support.coordination import until
from tests.support.streams import SPEC, Clock
from tests.unit.test_cache_leadership import Outages

TTL_S = 0.5
"""Longer than a busy machine lets a process wait: leases are renewed by real time."""
KEYS = Keyring.random()
CALLER = Caller("me", "lab")
RAW = PixelEncoding(MediaType.RAW_RGBA8)


def generation(name: str, body: bytes = b"body") -> Generation:
    request = Request(
        SPEC,
        PreviewPolicy(encoding=RAW),
        RAW,
        Priority.STANDARD,
        DisconnectPolicy(False, 1.0),
        CachePolicy(CacheMode.BYPASS),
        None,
        "id",
        body,
    )
    events = EventLog(f"generations/{name}", Clock(), chunk_bytes=1000, max_watchers=1)
    return Generation(name, CALLER, request, events, Clock(), UNTRACED, deadline=None, late=Mock(), on_end=Mock())


class Reading(Outages):
    """Reads nothing of a stream, for a number of times."""

    def __init__(self) -> None:
        super().__init__()
        self.blind: dict[str, int] = {}

    async def read(self, name: str) -> list[StreamEvent]:
        if self.blind.get(name, 0):
            self.blind[name] -= 1
            return []
        return await super().read(name)


class Replica:
    """One of the two replicas, without a planner."""

    def __init__(self, coordinator: Reading) -> None:
        self.sealer = Sealer(KEYS)
        self.host = Mock()
        self.tiers = Mock(delete=AsyncMock())
        self.context = ClusterContext(coordinator, self.sealer, KEYS, self.tiers, Mock(), Mock(), TTL_S, 60.0, 60.0)
        planner = Mock(keep_starts=AsyncMock(return_value=True))
        planner.start_keys.return_value, planner.numerics_id.return_value, planner.digest.return_value = (), "", ""
        planner.batch_tolerance.return_value = 0.0
        self.owners = Owners(self.context, self.host, planner, "me")

    def own(self, generation: Generation) -> OwnedGeneration:
        return self.owners._own[generation.identifier]

    def sleep(self, generation: Generation) -> None:
        """Stops renewing the lease, like a frozen process."""
        self.own(generation).leader._renewals.cancel()


class Pair:
    def __init__(self) -> None:
        self.coordinator = Reading()
        self.one, self.other = Replica(self.coordinator), Replica(self.coordinator)

    def name(self, generation: Generation) -> str:
        return self.one.context.name(generation.identifier)

    async def bound_to(self) -> str:
        """The generation that the request id is bound to."""
        [(name, (value, _))] = self.coordinator._claims.items()
        return str(json.loads(self.one.sealer.open(name, value)[0].data)["generation"])


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    yield made
    for replica in (made.one, made.other):
        await replica.owners.close()


# --- a request id changes hands only under the lease of the generation that it stood for ---


async def test_a_request_id_stands_for_what_was_accepted(pair: Pair) -> None:
    first, second = generation("a"), generation("b")
    assert await pair.one.owners.enroll(first) is None
    await pair.one.owners.record(first, [])
    assert first.durability is Durability.REPLICATED
    assert await pair.other.owners.enroll(second) == "a"
    assert not pair.other.owners.owns(second)
    with pytest.raises(AlreadyExistsError):
        await pair.other.owners.enroll(generation("c", b"another body"))
    assert await pair.bound_to() == "a"


async def test_who_is_about_to_accept_is_waited_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "PATIENCE_S", 0.3)
    first, second = generation("a"), generation("b")
    assert await pair.one.owners.enroll(first) is None
    with pytest.raises(UnavailableError):
        await pair.other.owners.enroll(second)
    assert await pair.bound_to() == "a" and not pair.other.owners.owns(second)
    await pair.one.owners.record(first, [])
    assert first.durability is Durability.REPLICATED


async def test_who_sleeps_before_it_accepts_never_accepts(pair: Pair) -> None:
    first, second = generation("a"), generation("b")
    assert await pair.one.owners.enroll(first) is None
    pair.one.sleep(first)
    assert await pair.other.owners.enroll(second) is None
    assert await pair.bound_to() == "b"
    with pytest.raises(UnavailableError):  # it wakes
        await pair.one.owners.record(first, [])
    await pair.other.owners.record(second, [])
    assert (first.durability, second.durability) == (Durability.LOCAL, Durability.REPLICATED)
    assert await pair.coordinator.read(pair.name(first)) == []


async def test_what_was_accepted_in_the_last_moment_keeps_its_request_id(pair: Pair) -> None:
    """Its record was written after the check for it and before the end of its lease."""
    first, second = generation("a"), generation("b")
    assert await pair.one.owners.enroll(first) is None
    await pair.one.owners.record(first, [])
    pair.one.sleep(first)
    await until(lambda: asyncio.sleep(0, not pair.one.own(first).leader.held))
    pair.coordinator.blind[pair.name(first)] = 1
    assert await pair.other.owners.enroll(second) == "a"
    assert await pair.bound_to() == "a"
    assert await pair.coordinator.holder(pair.name(first)) is None, "it is free to be taken over"


# --- the end ---


async def test_the_end_limits_what_is_kept_and_gives_the_lease_back(pair: Pair) -> None:
    one = generation("a")
    await pair.one.owners.enroll(one)
    await pair.one.owners.record(one, [])
    own = pair.one.own(one)
    own.starts = ("a/start/1",)
    pair.one.owners.settle(one, retryable=True)
    assert not pair.one.owners.owns(one)
    await eventually(lambda: not pair.one.owners._ending)
    assert await pair.coordinator.holder(own.name) is None
    pair.one.tiers.delete.assert_awaited_once_with("a/start/1")
    assert await pair.coordinator.unowned() == []
    assert await pair.other.owners.enroll(generation("b")) is None, "its request id is free again"


async def test_who_has_lost_the_lease_settles_nothing(pair: Pair) -> None:
    one = generation("a")
    await pair.one.owners.enroll(one)
    await pair.one.owners.record(one, [])
    own = pair.one.own(one)
    own.starts = ("a/start/1",)
    pair.one.sleep(one)

    async def take() -> Leadership | None:
        return await Leadership.take(pair.coordinator, own.name, TTL_S)

    taken: list[Leadership] = []
    await until(lambda: _into(taken, take()))
    await pair.one.owners.settle_record(own, 0.001, 0.0)
    pair.one.tiers.delete.assert_not_awaited()
    assert await pair.bound_to() == "a"
    assert pair.coordinator._roll == {own.name}
    await taken[0].close()


async def _into(found: list[Leadership], taking: Any) -> bool:
    if (leader := await taking) is not None:
        found.append(leader)
    return bool(found)


async def test_another_replicas_wish_is_noted_for_what_is_owned_here(pair: Pair) -> None:
    one = generation("a")
    await pair.one.owners.enroll(one)
    await pair.one.owners.record(one, [])
    pair.one.owners.hear_want("a", {"by": "me"})
    pair.one.owners.hear_want("b", {"by": "other"})
    assert not pair.one.owners.wants(one) and not pair.one.host.wanted.called
    pair.one.owners.hear_want("a", {"by": "other"})
    assert pair.one.owners.wants(one)
    pair.one.host.wanted.assert_called_once_with("a")


async def test_closing_gives_back_what_is_owned_though_leases_are_lost_meanwhile(pair: Pair) -> None:
    owned = [generation(name) for name in "abc"]
    for one in owned:
        one.request = replace(one.request, request_id="")
        await pair.one.owners.enroll(one)
        await pair.one.owners.record(one, [])
    leaders = [pair.one.own(one).leader for one in owned]
    closed, last = leaders[0].close, pair.one.own(owned[2])

    async def close() -> None:
        leaders[0].close = closed  # type: ignore[method-assign]
        await closed()
        pair.one.owners._lose(owned[2], last)

    leaders[0].close = close  # type: ignore[method-assign]
    await pair.one.owners.close()
    for leader in leaders[:2]:
        assert await pair.coordinator.holder(leader.lease.name) is None
    await leaders[2].close()


@pytest.mark.parametrize("adopted", [True, False])
async def test_a_record_that_is_not_answered_is_written_again_unless_another_has_adopted_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, *, adopted: bool
) -> None:
    """It exists, so another replica may take over, although the generation was accepted as LOCAL."""
    monkeypatch.setattr(journal_rules, "RETRY_S", 0.005)
    one, publish = generation("a"), pair.coordinator.publish

    async def deaf(lease: Lease, data: bytes) -> str:
        await publish(lease, data)
        raise StoreUnavailableError("no answer in time")

    pair.coordinator.publish = deaf  # type: ignore[method-assign]
    await pair.one.owners.enroll(one)
    await pair.one.owners.record(one, [])
    assert one.durability is Durability.LOCAL and one.journal is not None
    taken: list[Leadership] = []
    if adopted:
        pair.one.sleep(one)
        await until(lambda: _into(taken, Leadership.take(pair.coordinator, pair.name(one), TTL_S)))
    pair.coordinator.publish = publish  # type: ignore[method-assign]
    if adopted:
        await eventually(lambda: pair.one.host.moved.called)
        assert not pair.one.owners.owns(one) and one.durability is Durability.LOCAL
        await taken[0].close()
    else:
        await eventually(lambda: one.durability is Durability.REPLICATED)
        assert pair.one.owners.owns(one) and not pair.one.host.moved.called
        assert pair.coordinator._roll == {pair.name(one)}


@pytest.mark.parametrize("taken", [True, False])
async def test_the_end_of_what_has_no_record_is_void_where_another_has_taken_its_lease(
    pair: Pair, *, taken: bool
) -> None:
    """And with the lease its request id."""
    one = generation("a")
    await pair.one.owners.enroll(one)
    own, leaders = pair.one.own(one), list[Leadership]()
    if taken:
        pair.one.sleep(one)
        await until(lambda: _into(leaders, Leadership.take(pair.coordinator, own.name, TTL_S)))
    else:
        pair.coordinator._executions.clear()  # the service has lost its data, so nobody else has it
    pair.one.owners.settle(one, retryable=False)
    await eventually(lambda: not pair.one.owners._ending)
    assert pair.one.host.moved.called == taken
    assert await pair.coordinator.holder(own.name) != own.leader.lease
    for leader in leaders:
        await leader.close()


@pytest.mark.parametrize("answered", [True, False])
async def test_what_is_refused_while_redis_does_not_answer_is_removed_later(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, *, answered: bool
) -> None:
    """Otherwise another replica would find its record, and run what was refused."""
    monkeypatch.setattr(owners, "RETRY_S", 0.005)
    one = generation("a")
    await pair.one.owners.enroll(one)
    if not answered:
        pair.coordinator.out = True
    await pair.one.owners.record(one, [])
    pair.coordinator.out = True
    leader = pair.one.own(one).leader
    await pair.one.owners.dismiss(one)
    assert not pair.one.owners.owns(one) and pair.coordinator._roll == {pair.name(one)}
    pair.coordinator.out = False
    await eventually(lambda: not pair.one.owners._ending)
    assert pair.coordinator._roll == set() and await pair.coordinator.holder(leader.lease.name) is None
    assert len(await pair.coordinator.read(leader.lease.name)) == answered, "it is not written again"
    assert await pair.other.owners.enroll(generation("b")) is None, "its request id is free again"


async def test_what_is_refused_is_removed_although_its_call_is_cancelled(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its lease would be renewed as long as the process lives."""
    one, begun = generation("a"), asyncio.Event()
    await pair.one.owners.enroll(one)
    await pair.one.owners.record(one, [])
    leader, settle = pair.one.own(one).leader, pair.one.owners.settle_record

    async def hang_once(*given: Any) -> None:
        if not begun.is_set():
            begun.set()
            await asyncio.Event().wait()
        await settle(*given)

    monkeypatch.setattr(pair.one.owners, "settle_record", hang_once)
    call = asyncio.create_task(pair.one.owners.dismiss(one))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: not pair.one.owners._ending)
    assert pair.coordinator._roll == set() and await pair.coordinator.holder(leader.lease.name) is None


async def test_what_was_enrolled_before_redis_lost_its_memory_is_bound_again(pair: Pair) -> None:
    one = generation("a")
    await pair.one.owners.enroll(one)
    for memory in (pair.coordinator._executions, pair.coordinator._claims, pair.coordinator._roll):
        memory.clear()
    assert await pair.one.own(one).leader.confirm()
    await pair.one.owners.record(one, [])
    assert one.journal is not None
    await one.journal.closed()
    assert await pair.bound_to() == "a"
    assert await pair.other.owners.enroll(generation("b")) == "a"


@pytest.mark.parametrize("recorded", [True, False])
async def test_what_is_let_go_is_free_for_others(pair: Pair, *, recorded: bool) -> None:
    """Also if it has no record."""
    one = generation("a")
    await pair.one.owners.enroll(one)
    if recorded:
        await pair.one.owners.record(one, [])
    own = pair.one.own(one)
    pair.one.owners.let_go(one)
    await eventually(lambda: not pair.one.owners._ending)
    assert await pair.coordinator.holder(own.name) is None
    assert not pair.one.owners.owns(one)


async def test_one_that_is_lost_leaves_what_was_adopted_since(pair: Pair) -> None:
    before, since = generation("a"), generation("a")
    await pair.one.owners.enroll(before)
    await pair.one.owners.record(before, [])
    old = pair.one.owners._own.pop("a")
    assert await pair.coordinator.release(old.leader.lease)
    leader = await Leadership.take(pair.coordinator, old.name, TTL_S)
    assert leader is not None
    new = OwnedGeneration(old.name, leader)
    await pair.one.owners.adopt(since, new, [])
    await eventually(lambda: pair.one.host.moved.called)
    pair.one.host.moved.assert_called_once_with(before)
    assert pair.one.own(since) is new and since.journal is not None and await leader.confirm()
