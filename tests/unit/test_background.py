"""Exceptions of background tasks are always logged."""

from __future__ import annotations

import asyncio
import contextlib
import functools

import pytest
from safelight_server.app import listening
from safelight_server.telemetry import background
from safelight_server.telemetry.background import keep_running, log_failure
from structlog.testing import capture_logs

from tests.conftest import eventually


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RESTART_S", 0.0)


class Work:
    """Raises some exceptions, then returns or goes on for ever."""

    def __init__(self, num_faults: int, *, returns: bool = True) -> None:
        self.num_begun = 0
        self._num_faults = num_faults
        self._returns = returns

    async def run(self) -> None:
        self.num_begun += 1
        if self.num_begun <= self._num_faults:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a poisoned record")
        if not self._returns:
            await asyncio.Event().wait()


async def test_work_that_raises_is_logged_and_begun_again() -> None:
    work = Work(3)
    with capture_logs() as logs:
        await keep_running(work.run, "sweep")
    assert work.num_begun == 4
    assert [(entry["event"], entry["work"], entry["log_level"]) for entry in logs] == [("bug", "sweep", "error")] * 3


async def test_work_that_returns_is_over() -> None:
    work = Work(0)
    with capture_logs() as logs:
        await keep_running(work.run, "sweep")
    assert work.num_begun == 1 and not logs


async def test_cancelling_ends_it() -> None:
    task = asyncio.create_task(keep_running(Work(0, returns=False).run, "sweep"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_every_work_of_the_server_goes_on() -> None:
    work = Work(2, returns=False)
    with capture_logs() as logs:
        task = listening._begin(functools.partial(work.run))
        await eventually(lambda: work.num_begun == 3)
    assert len(logs) == 2 and not task.done()
    task.cancel()


async def test_a_task_that_has_failed_is_logged() -> None:
    with capture_logs() as logs:
        for work in (Work(1), Work(0), Work(0, returns=False)):
            task = asyncio.create_task(work.run(), name="one")
            task.add_done_callback(log_failure)
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, UnicodeDecodeError):
                await task
            await asyncio.sleep(0)
    assert [(entry["event"], entry["work"]) for entry in logs] == [("bug", "one")]
