"""Blocking work in threads: a bounded number at once, tenants in turns, and no turn given up by who is cancelled."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from safelight_server.threads import FairTurns, OneAtATime

from tests.conftest import eventually


async def beginning(*tasks: asyncio.Task[None]) -> None:
    """Lets tasks run until they wait."""
    for _ in range(3 + len(tasks)):
        await asyncio.sleep(0)


async def test_subjects_take_turns_whatever_each_has_asked_for():
    turns, had = FairTurns(1), []

    async def wants(subject: str) -> None:
        async with turns.turn(subject):
            had.append(subject)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(wants(subject)) for subject in "aaaaabbc"]
    await asyncio.gather(*tasks)
    assert "".join(had) == "aabcabaa", "the first one has the turn before others ask"


async def test_so_many_have_a_turn_at_once_and_no_more():
    turns, going_on, num_running = FairTurns(3), asyncio.Event(), 0

    async def wants() -> None:
        nonlocal num_running
        async with turns.turn("a"):
            num_running += 1
            await going_on.wait()

    tasks = [asyncio.create_task(wants()) for _ in range(8)]
    await beginning(*tasks)
    assert num_running == 3
    going_on.set()
    await asyncio.gather(*tasks)
    assert num_running == 8


async def test_who_is_cancelled_leaves_the_turn_to_others():
    turns = FairTurns(1)
    await turns.take("a")
    waiting, late, other = (asyncio.create_task(turns.take(subject)) for subject in "abc")
    await beginning(waiting, late, other)
    waiting.cancel()
    await beginning(waiting)
    turns.release()
    late.cancel()  # it has the turn by now, and has not seen it yet
    await beginning(late, other)
    assert waiting.cancelled() and late.cancelled() and other.done()
    turns.release()
    async with asyncio.timeout(5), turns.turn("d"):
        pass


async def test_the_next_begins_when_the_thread_is_done_though_who_asked_has_left():
    going_on, begun = threading.Event(), []

    def work(name: str) -> str:
        begun.append(name)
        assert going_on.wait(30)
        return name

    with ThreadPoolExecutor(4) as pool:
        one_at_a_time = OneAtATime(pool)
        try:
            left = asyncio.create_task(one_at_a_time.run("a", work, "left"))
            await eventually(lambda: begun == ["left"])
            left.cancel()
            following = asyncio.create_task(one_at_a_time.run("a", work, "next"))
            await beginning(left, following)
            assert left.cancelled()
            assert pool.submit(int, 1).result(30) == 1, "a thread is free"
            assert begun == ["left"]
        finally:
            going_on.set()
        assert await following == "next"


async def test_what_the_work_raises_is_raised_and_the_next_one_runs():
    one_at_a_time = OneAtATime()
    with pytest.raises(ZeroDivisionError):
        await one_at_a_time.run("a", divmod, 1, 0)
    assert await one_at_a_time.run("a", divmod, 7, 2) == (3, 1)


async def test_a_pool_that_is_closed_keeps_no_turn():
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    one_at_a_time = OneAtATime(pool)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            async with asyncio.timeout(5):
                await one_at_a_time.run("a", int)
