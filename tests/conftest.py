"""Fixtures for all tests."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before any test imports onnxruntime or huggingface_hub: see safelight_server.runtime.onnx.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

try:
    import uvloop
    from safelight_server.app.server import Running, serving
    from safelight_server.settings import load
except ImportError:  # the training environment has no server dependencies; its tests use none of these
    pass


def pytest_configure(config: pytest.Config) -> None:
    """Temporary files of the tests and of the processes that they start are in a folder that goes when the tests end.

    Some are killed before they could remove their own: Triton's stubs, for one, never do.
    """
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path of a failed test stays
    folder = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="safelight-tests-")
    tempfile.tempdir = None  # it is looked up anew
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the server runs on: asyncio's takes what uvloop refuses."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Ends a test whose time is up by cancelling all tasks, again and again if need be.

    pytest-timeout raises out of the signal, into whatever runs then: within uvloop that has crashed the process.
    Here that is done only where no loop runs, or where the loop does not hear the cancelling.
    """
    time_is_up = f"{item.nodeid}: its time is up, {settings.timeout} s"
    heard = True

    def cancel(loop: asyncio.AbstractEventLoop) -> None:
        nonlocal heard
        heard = True
        print(time_is_up, file=sys.stderr)
        for task in asyncio.all_tasks(loop):
            task.print_stack(file=sys.stderr)
            task.cancel(time_is_up)

    def ring(signum: int, frame: object) -> None:
        nonlocal heard
        loop = asyncio._get_running_loop()
        if loop is None or not heard:
            pytest.fail(time_is_up)
        heard = False
        loop.call_soon_threadsafe(cancel, loop)

    def stop() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = stop  # type: ignore[attr-defined]  # what pytest-timeout calls at the end
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, CANCEL_EVERY_S)
    return True


hypothesis.settings.register_profile("safelight", deadline=None)  # machines are shared: no test asserts a time
hypothesis.settings.load_profile("safelight")

MODELS = Path(__file__).parent.parent / "models"
CANCEL_EVERY_S = 10.0
"""A test whose time is up."""
Start = Callable[..., "AbstractAsyncContextManager[Running]"]


@pytest.fixture
def start() -> Start:
    """Starts a real server of this process on a free port; settings as keywords."""

    return serving_here


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder whose path leaves room for the name of a unix socket: both have 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="safelight-", dir="/tmp") as folder:
        yield Path(folder)


@asynccontextmanager
async def serving_here(*, wall: Callable[[], float] = time.time, **settings: object) -> AsyncIterator[Running]:
    """A real server of this process on a free port; `wall`: the clock of its machine."""
    given = {"port": 0, "models_dir": MODELS, "log_level": "error"} | settings
    async with serving(load(**given), wall) as running:
        yield running


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Polls until `condition` holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it never came true"
        await asyncio.sleep(0.005)
