"""Turns at sending: few messages in each turn of the event loop, tenant by tenant; a single stream never waits."""

from __future__ import annotations

import asyncio

import pytest
from safelight_server.stream import SendTurns

from tests.support.streams import settle


class Loop:
    """Counts the turns of the event loop, and records who sent in each."""

    def __init__(self, turns: SendTurns) -> None:
        self.turns = turns
        self.number = 0
        self.sent: list[tuple[int, str]] = []

    async def count(self) -> None:
        while True:
            self.number += 1
            await asyncio.sleep(0)

    async def send(self, tenant: str) -> None:
        await self.turns.take(tenant)
        self.sent.append((self.number, tenant))


@pytest.fixture
async def loop():
    made = Loop(SendTurns(per_turn=2))
    counting = asyncio.create_task(made.count())
    yield made
    counting.cancel()


async def test_one_alone_never_waits(loop):
    for _ in range(5):
        taking = loop.turns.take("lab")
        with pytest.raises(StopIteration):
            taking.send(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_in_one_turn_of_the_loop_only_a_few_send(loop):
    await asyncio.gather(*(loop.send("lab") for _ in range(63)))
    turns = [turn for turn, _ in loop.sent]
    assert len(turns) == 63
    assert max(turns.count(turn) for turn in turns) == 2


async def test_a_tenant_with_one_stream_does_not_wait_for_all_of_another(loop):
    rude = [asyncio.create_task(loop.send("rude")) for _ in range(63)]
    await asyncio.sleep(0)
    await loop.send("polite")
    assert [tenant for _, tenant in loop.sent].index("polite") <= 6
    await asyncio.gather(*rude)


async def test_who_has_left_takes_no_turn(loop):
    leaving = [asyncio.create_task(loop.send("lab")) for _ in range(20)]
    await asyncio.sleep(0)
    staying = asyncio.create_task(loop.send("lab"))
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await settle()
    assert staying.done()
