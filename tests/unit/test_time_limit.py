"""The time limit ends a test that waits for ever, also within uvloop. These tests raise its alarms themselves."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace

import pytest

from tests import conftest


@pytest.fixture
def alarm():
    """Replaces the test's own limit, and raises the alarm of the new one."""
    item = SimpleNamespace(nodeid="one that waits", cancel_timeout=None)
    assert conftest.pytest_timeout_set_timer(item, SimpleNamespace(timeout=3600.0))
    yield lambda: signal.raise_signal(signal.SIGALRM)
    item.cancel_timeout()


async def test_what_waits_for_ever_is_cancelled_when_its_time_is_up(alarm, capsys):
    asyncio.get_running_loop().call_soon(alarm)
    with pytest.raises(asyncio.CancelledError, match="one that waits: its time is up"):
        await asyncio.Event().wait()
    assert "one that waits: its time is up" in capsys.readouterr().err


async def test_it_is_cancelled_again_if_it_goes_on(alarm):
    remains_s, every_s = signal.getitimer(signal.ITIMER_REAL)
    assert remains_s > 0
    assert every_s == conftest.CANCEL_EVERY_S
    for _ in range(2):
        asyncio.get_running_loop().call_soon(alarm)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()


async def test_where_the_loop_does_not_hear_it_fails(alarm):
    alarm()
    with pytest.raises(pytest.fail.Exception, match="its time is up"):
        alarm()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.Event().wait()  # of the first


def test_without_a_loop_it_fails(alarm):
    with pytest.raises(pytest.fail.Exception, match="its time is up"):
        alarm()
