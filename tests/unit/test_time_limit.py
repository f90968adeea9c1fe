"""The time limit of a test ends one that waits for ever, within uvloop too."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from tests import conftest


@pytest.fixture
def limit():
    """Sets a limit in place of the test's own."""
    timers = []

    def of(timeout_s):
        timers.append(SimpleNamespace(nodeid="one that waits", cancel_timeout=None))
        assert conftest.pytest_timeout_set_timer(timers[-1], SimpleNamespace(timeout=timeout_s))

    yield of
    for timer in timers:
        timer.cancel_timeout()


async def test_what_waits_for_ever_is_cancelled_when_its_time_is_up(limit, capsys):
    limit(0.01)
    with pytest.raises(asyncio.CancelledError, match="one that waits: its time is up"):
        await asyncio.Event().wait()
    assert "one that waits: its time is up" in capsys.readouterr().err


async def test_it_is_cancelled_again_if_it_goes_on(limit, monkeypatch):
    monkeypatch.setattr(conftest, "CANCEL_EVERY_S", 0.01)
    limit(0.01)
    for _ in range(2):
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()


def test_without_a_loop_it_fails(limit):
    limit(0.01)
    with pytest.raises(pytest.fail.Exception, match="its time is up"):
        while True:
            pass
