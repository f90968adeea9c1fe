"""Deferred callbacks, alarms and embedding waiters of the engine."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from safelight_server.domain.errors import UnavailableError
from safelight_server.engine.deferred import TURNS, DeferredCallbacks
from safelight_server.engine.embeddings import EmbeddingWaiters
from safelight_server.engine.engine import Alarm

from tests.conftest import eventually


async def test_reports_are_told_in_order_once_and_not_before_calls_have_left():
    deferred, told = DeferredCallbacks(), []
    for n in range(3):
        deferred.defer(lambda n=n: told.append(n))
    deferred.run_soon()
    for _ in range(TURNS):
        assert told == []
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told == [0, 1, 2]
    deferred.run()
    assert told == [0, 1, 2]
    assert len(deferred) == 0


async def test_what_a_report_adds_is_told_too():
    deferred, told = DeferredCallbacks(), []
    deferred.defer(lambda: deferred.defer(lambda: told.append("second")))
    deferred.run()
    assert told == ["second"]


async def test_an_alarm_rings_at_the_earliest_time_it_was_set_to():
    rings = []
    alarm = Alarm(lambda: rings.append(asyncio.get_running_loop().time()))
    began = asyncio.get_running_loop().time()
    alarm.set(None)
    alarm.set(60.0)
    alarm.set(0.01)
    alarm.set(30.0)
    await eventually(lambda: bool(rings))
    assert began + 0.009 <= rings[0] < began + 30, "uvloop counts milliseconds"
    alarm.set(0.01)
    await eventually(lambda: len(rings) == 2)
    alarm.set(0.0)
    alarm.stop()
    await asyncio.sleep(0.01)
    assert len(rings) == 2


def test_an_alarm_that_rings_at_once_can_be_set_again_on_the_servers_own_loop():
    """uvloop has no timers of less than a millisecond: it calls soon, and what it returns is no timer's handle."""
    rings = []

    async def ring_at_once() -> None:
        alarm = Alarm(lambda: rings.append(True))
        alarm.set(0.0)
        alarm.set(0.0)
        alarm.set(60.0)
        await eventually(lambda: bool(rings))

    uvloop.run(ring_at_once())
    assert rings == [True]


async def test_all_who_ask_share_one_answer_and_one_refusal():
    asked = EmbeddingWaiters()
    asked.add("a")
    both = [asyncio.ensure_future(asked.get("a")) for _ in range(2)]
    await asyncio.sleep(0)
    both[0].cancel()
    asked.answer("a", "embedding")  # type: ignore[arg-type]  # any value
    assert await both[1] == "embedding"
    asked.add("b")
    waiting = asyncio.ensure_future(asked.get("b"))
    await asyncio.sleep(0)
    asked.refuse("b", UnavailableError("no"))
    with pytest.raises(UnavailableError):
        await waiting
    assert "b" not in asked
    assert len(asked) == 0
