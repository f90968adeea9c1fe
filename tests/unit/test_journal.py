"""The journal writes events before streams get them; an outage of Redis delays and loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from safelight_server.cluster import journal_rules
from safelight_server.cluster.journal import Journal
from safelight_server.cluster.records import EventRecord, parse
from safelight_server.coordination.leadership import Leadership
from safelight_server.domain.events import FinishReason, GenerationState, OutputFinished
from safelight_server.domain.picture import EncodedPicture
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import Sealer
from structlog.testing import capture_logs

from tests.conftest import eventually
from tests.support.coordination import until
from tests.support.streams import PICTURE, settle
from tests.unit.test_cache_leadership import Outages

NAME = "x"


class Desk:
    """A journal and its effects."""

    def __init__(self, coordinator: Outages, leader: Leadership) -> None:
        self.coordinator = coordinator
        self.shown: list[int] = []
        self.kept: list[int] = []
        self.lost = 0
        self.settled = 0
        self.journal = Journal(leader, self.sealer, self._put, lambda: (GenerationState.RUNNING, None), self._lose)

    sealer = Sealer(Keyring.random())

    def event(self, sequence: int) -> None:
        event = OutputFinished(sequence, FinishReason.COMPLETED, 1)
        self.journal.event(event, sequence, b"data", lambda: self.shown.append(sequence))

    def picture(self, number: int) -> None:
        self.journal.picture(number, PICTURE, lambda: self.shown.append(number))

    async def settle(self) -> None:
        self.settled += 1

    async def written(self) -> list[int]:
        found = [parse(self.sealer, NAME, event.data) for event in await self.coordinator.read(NAME)]
        return [told.sequence for told in found if isinstance(told, EventRecord)]

    async def _put(self, index: int, picture: EncodedPicture) -> bool:
        if not self.coordinator.out:
            self.kept.append(index)
        return not self.coordinator.out

    def _lose(self) -> None:
        self.lost += 1


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    monkeypatch.setattr(journal_rules, "RETRY_S", 0.005)
    coordinator = Outages()
    leader = await Leadership.take(coordinator, NAME, 0.06)
    assert leader is not None
    made = Desk(coordinator, leader)
    yield made
    await made.journal.abandon()


async def test_nothing_is_shown_before_it_is_written_and_all_in_order(desk: Desk) -> None:
    desk.event(1)
    desk.picture(2)
    desk.event(3)
    assert desk.shown == []
    await eventually(lambda: len(desk.shown) == 3)
    assert (desk.shown, desk.kept, await desk.written()) == ([1, 2, 3], [2], [1, 3])


async def test_an_outage_holds_nothing_up_and_loses_nothing(desk: Desk) -> None:
    desk.coordinator.out = True
    desk.event(1)
    desk.picture(2)
    desk.event(3)
    await eventually(lambda: len(desk.shown) == 3)
    assert await desk.written() == []
    desk.coordinator.out = False
    await eventually(lambda: desk.kept == [2])
    desk.event(4)
    await eventually(lambda: len(desk.shown) == 4)
    assert (desk.shown, await desk.written()) == ([1, 2, 3, 4], [1, 3, 4])


async def test_in_an_outage_nothing_waits_for_the_next_try(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_rules, "RETRY_S", 600.0)
    desk.coordinator.out = True
    desk.event(1)
    await eventually(lambda: desk.shown == [1])
    desk.picture(2)
    desk.event(3)
    await eventually(lambda: desk.shown == [1, 2, 3])


async def test_the_end_comes_after_all_is_written_and_gives_the_ownership_back(desk: Desk) -> None:
    desk.event(1)
    desk.journal.end(desk.settle)
    await desk.journal.closed()
    assert (await desk.written(), desk.settled, desk.lost) == ([1], 1, 0)
    assert await desk.coordinator.holder(NAME) is None


async def test_one_who_was_replaced_writes_and_shows_nothing_more(desk: Desk) -> None:
    desk.coordinator.out = True
    desk.event(1)
    await eventually(lambda: desk.shown == [1])
    execution = desk.coordinator._execution(NAME)
    execution.lease = None
    desk.coordinator.out = False
    assert await desk.coordinator.acquire(NAME, "other", 30.0) is not None
    await eventually(lambda: desk.lost == 1)
    desk.event(2)
    await settle()
    assert desk.shown == [1], "what comes after is the new owner's to show"
    assert await desk.written() == []


async def test_a_long_outage_leaves_no_gap_and_what_has_ended_is_given_up(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_rules, "GIVE_UP_S", -1.0)  # at the first try
    desk.coordinator.out = True
    desk.event(1)
    await eventually(lambda: desk.shown == [1])
    desk.coordinator.out = False
    desk.event(2)
    await desk.journal.closed()
    assert (desk.shown, await desk.written()) == ([1, 2], [1, 2])
    desk.coordinator.out = True
    desk.event(3)
    desk.journal.end(desk.settle)
    await desk.journal.closed()
    assert (desk.shown, desk.settled) == ([1, 2, 3], 1)
    desk.coordinator.out = False
    assert await desk.written() == [1, 2], "nothing follows what was given up"


async def test_what_cannot_be_written_at_all_is_given_up_and_the_lease_with_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an unforeseen exception too; otherwise the lease would be renewed for ever."""
    monkeypatch.setattr(journal_rules, "GIVE_UP_S", 0.05)

    async def put(index: int, picture: EncodedPicture) -> bool:
        raise ValueError(index)

    desk.journal._put = put
    desk.picture(1)
    desk.event(2)
    desk.journal.end(desk.settle)
    with capture_logs() as logs:
        await eventually(lambda: desk.settled == 1)
        await desk.journal.closed()
    assert desk.shown == [1, 2] and desk.kept == [] and await desk.written() == []
    assert {entry["event"] for entry in logs} >= {"bug"}
    assert await desk.coordinator.holder(NAME) is None


async def test_a_picture_that_was_stored_by_one_who_is_no_owner_any_more_is_not_shown(desk: Desk) -> None:
    """It was frozen meanwhile: no fencing protects the store, and the new owner may end the output without a picture."""
    leader = desk.journal._leader
    put, gate = desk.journal._put, asyncio.Event()

    async def late(index: int, picture: EncodedPicture) -> bool:
        await gate.wait()
        return await put(index, picture)

    desk.journal._put = late
    desk.picture(1)
    leader._renewals.cancel()
    await until(lambda: desk.coordinator.acquire(NAME, "other", 60.0))
    assert not leader.held and not leader.lost.is_set()
    gate.set()
    await eventually(lambda: desk.lost == 1)
    assert desk.kept == [1] and desk.shown == []


async def test_what_was_written_is_written_again_after_a_loss_of_memory(desk: Desk) -> None:
    leader = desk.journal._leader
    desk.event(1)
    for _ in range(100):
        for state in (GenerationState.SUSPENDED, GenerationState.RUNNING):
            desk.journal.write(EventRecord("state", b"", state=state))
    desk.picture(2)
    await eventually(lambda: desk.shown == [1, 2])
    desk.coordinator._executions.clear()
    desk.kept.clear()
    desk.event(3)
    assert await leader.confirm()
    await eventually(lambda: desk.shown == [1, 2, 3])
    await desk.journal.closed()
    assert desk.kept == [2], "shown once, and stored again"
    found = [parse(desk.sealer, NAME, event.data) for event in await desk.coordinator.read(NAME)]
    assert [(told.sequence, told.state) for told in found if isinstance(told, EventRecord)] == [
        (1, None),
        (0, GenerationState.RUNNING),
        (3, None),
    ], "of its states the newest"
