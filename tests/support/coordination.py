"""Tests that every implementation of `Coordinator` must pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from safelight_server.coordination.base import (
    BEGINNING,
    CommitOutcome,
    CommittedResult,
    Coordinator,
    FencedError,
    LeaderLostError,
    StreamEvent,
)

TTL_S = 30.0
SHORT_S = 0.05


async def until(condition: Callable[[], Awaitable[object]], timeout_s: float = 20.0) -> None:
    """Polls an awaitable condition until it is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


async def collect(coordinator: Coordinator, name: str, after: str = BEGINNING) -> list[bytes]:
    """All events of a stream up to its commit."""
    return [event.data async for event in coordinator.follow(name, after)]


class CoordinationRules:
    """The tests; a subclass provides the fixture `coordinator`."""

    async def test_one_leads_and_tokens_grow(self, coordinator: Coordinator) -> None:
        first = await coordinator.acquire("x", "a", TTL_S)
        assert first is not None
        assert await coordinator.acquire("x", "b", TTL_S) is None
        assert await coordinator.acquire("x", "a", TTL_S) == first, "asking again is no second lease"
        other = await coordinator.acquire("y", "b", TTL_S)
        assert other is not None and other.token > first.token
        assert await coordinator.release(first)
        second = await coordinator.acquire("x", "b", TTL_S)
        assert second is not None and second.token > other.token
        assert await coordinator.holder("x") == second
        assert await coordinator.holder("z") is None

    async def test_of_many_at_once_one_leads(self, coordinator: Coordinator) -> None:
        leases = await asyncio.gather(*(coordinator.acquire("x", f"owner{n}", TTL_S) for n in range(20)))
        assert sum(lease is not None for lease in leases) == 1

    async def test_only_its_owner_renews_and_releases(self, coordinator: Coordinator) -> None:
        mine = await coordinator.acquire("x", "a", SHORT_S)
        assert mine is not None
        await until(lambda: coordinator.acquire("x", "b", TTL_S))
        assert not await coordinator.renew(mine, TTL_S)
        assert not await coordinator.release(mine)
        theirs = await coordinator.holder("x")
        assert theirs is not None and theirs.owner == "b"

    async def test_a_lease_ends_by_itself_unless_renewed(self, coordinator: Coordinator) -> None:
        lease = await coordinator.acquire("x", "a", SHORT_S)
        assert lease is not None
        assert await coordinator.renew(lease, TTL_S)
        assert await coordinator.acquire("x", "b", TTL_S) is None
        assert await coordinator.renew(lease, SHORT_S)
        await until(lambda: coordinator.acquire("x", "b", TTL_S))

    async def test_events_are_read_in_order_from_any_place(self, coordinator: Coordinator) -> None:
        lease = await coordinator.acquire("x", "a", TTL_S)
        assert lease is not None
        places = [await coordinator.publish(lease, bytes([n])) for n in range(5)]
        early = asyncio.create_task(collect(coordinator, "x"))
        late = asyncio.create_task(collect(coordinator, "x", places[2]))
        places += [await coordinator.publish(lease, bytes([n])) for n in range(5, 8)]
        assert await coordinator.commit(lease, "pointer", b"bill") is CommitOutcome.COMMITTED
        assert await early == [bytes([n]) for n in range(8)]
        assert await late == [bytes([n]) for n in range(3, 8)]
        assert await collect(coordinator, "x", places[-1]) == []

    async def test_who_follows_learns_that_the_leader_died_after_all_its_events(self, coordinator: Coordinator) -> None:
        lease = await coordinator.acquire("x", "a", SHORT_S)
        assert lease is not None
        await coordinator.publish(lease, b"1")
        seen: list[StreamEvent] = []
        with pytest.raises(LeaderLostError):
            async for event in coordinator.follow("x"):
                seen.append(event)
        assert [event.data for event in seen] == [b"1"]
        second = await coordinator.acquire("x", "b", TTL_S)
        assert second is not None
        await coordinator.publish(second, b"2")
        await coordinator.commit(second, "pointer", b"bill")
        assert await collect(coordinator, "x", seen[-1].place) == [b"2"]

    async def test_one_who_was_replaced_publishes_and_commits_nothing(self, coordinator: Coordinator) -> None:
        old = await coordinator.acquire("x", "a", SHORT_S)
        assert old is not None
        await until(lambda: coordinator.acquire("x", "b", TTL_S))
        new = await coordinator.holder("x")
        assert new is not None
        with pytest.raises(FencedError):
            await coordinator.publish(old, b"late")
        assert await coordinator.commit(old, "old", b"old") is CommitOutcome.FENCED
        assert await coordinator.result("x") is None
        assert await coordinator.commit(new, "new", b"new") is CommitOutcome.COMMITTED
        assert await coordinator.commit(old, "old", b"old") is CommitOutcome.TAKEN
        assert await coordinator.result("x") == CommittedResult("new", "b", new.token)
        assert [bill.data for bill in await coordinator.bills()] == [b"new"]

    async def test_a_token_before_is_refused_though_the_owner_is_the_same(self, coordinator: Coordinator) -> None:
        old = await coordinator.acquire("x", "a", TTL_S)
        assert old is not None
        await coordinator.release(old)
        new = await coordinator.acquire("x", "a", TTL_S)
        assert new is not None and new.token > old.token
        assert await coordinator.commit(old, "old", b"old") is CommitOutcome.FENCED
        assert await coordinator.bills() == []

    async def test_one_whose_lease_ran_out_and_whom_nobody_replaced_commits(self, coordinator: Coordinator) -> None:
        lease = await coordinator.acquire("x", "a", SHORT_S)
        assert lease is not None

        async def ended() -> bool:
            return await coordinator.holder("x") is None

        await until(ended)
        assert await coordinator.commit(lease, "pointer", b"bill") is CommitOutcome.COMMITTED

    async def test_asking_twice_commits_and_bills_once(self, coordinator: Coordinator) -> None:
        lease = await coordinator.acquire("x", "a", TTL_S)
        assert lease is not None
        bills = [bytes([number]) for number in range(10)]
        outcomes = await asyncio.gather(*(coordinator.commit(lease, "pointer", bill) for bill in bills))
        assert set(outcomes) == {CommitOutcome.COMMITTED}
        assert len(await coordinator.bills()) == 1
        assert await coordinator.acquire("x", "b", TTL_S) is None, "it is done"

    async def test_a_bill_that_comes_again_after_its_result_was_forgotten_is_written_once(
        self, coordinator: Coordinator
    ) -> None:
        """The answer to the first commit was lost, and another replica found the picture gone and forgot its result."""
        for _ in range(2):
            lease = await coordinator.acquire("x", "a", TTL_S)
            assert lease is not None
            assert await coordinator.commit(lease, "pointer", b"bill") is CommitOutcome.COMMITTED
            result = await coordinator.result("x")
            assert result is not None
            await coordinator.forget("x", result)
        again = await coordinator.acquire("x", "a", TTL_S)
        assert again is not None
        await coordinator.commit(again, "pointer", b"another")
        assert [bill.data for bill in await coordinator.bills()] == [b"bill", b"another"]

    async def test_a_result_that_is_gone_can_be_forgotten_and_computed_anew(self, coordinator: Coordinator) -> None:
        lease = await coordinator.acquire("x", "a", TTL_S)
        assert lease is not None
        await coordinator.commit(lease, "pointer", b"bill")
        result = await coordinator.result("x")
        assert result is not None
        assert not await coordinator.forget("x", CommittedResult("pointer", "a", result.token + 1))
        assert await coordinator.forget("x", result)
        assert not await coordinator.forget("x", result)
        assert await coordinator.acquire("x", "b", TTL_S) is not None

    async def test_bills_are_read_from_any_place(self, coordinator: Coordinator) -> None:
        for number in range(5):
            lease = await coordinator.acquire(f"x{number}", "a", TTL_S)
            assert lease is not None
            await coordinator.commit(lease, "pointer", bytes([number]))
        bills = await coordinator.bills(limit=2)
        assert [bill.data for bill in bills + await coordinator.bills(bills[-1].place)] == [
            bytes([n]) for n in range(5)
        ]

    async def test_a_stream_without_a_leader(self, coordinator: Coordinator) -> None:
        await coordinator.append("news", b"1")
        seen = []

        async def read() -> None:
            async for event in coordinator.follow("news", leader=False):
                seen.append(event.data)
                if len(seen) == 3:
                    return

        reading = asyncio.create_task(read())
        await coordinator.append("news", b"2")
        await until(lambda: asyncio.sleep(0, len(seen) == 2))
        await coordinator.append("news", b"3")
        await reading
        assert seen == [b"1", b"2", b"3"]
