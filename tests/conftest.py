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
    """Puts temporary files of the tests and of their processes into a folder that is removed when the tests end.

    Some processes are killed before they can remove their own files; Triton's stubs never remove theirs.
    """
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # keeps tmp_path of a failed test
    folder = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="safelight-tests-")
    tempfile.tempdir = None  # so that Python looks it up again
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Runs tests on uvloop, as the server does: asyncio's own loop accepts some calls that uvloop refuses."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Ends an overdue test by cancelling all its tasks, repeatedly if necessary.

    pytest-timeout raises an exception from the signal handler, which within uvloop has crashed the process. Here that
    is done only if no loop runs, or if the loop does not react to the cancellation.
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


hypothesis.settings.register_profile(
    "safelight",
    deadline=None,  # machines are shared: no test asserts a time
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="CI" in os.environ,  # there the same examples each time; elsewhere new ones, and those that failed
)
hypothesis.settings.load_profile("safelight")

MODELS = Path(__file__).parent.parent / "models"
CANCEL_EVERY_S = 10.0
"""Set when a test is overdue."""
Start = Callable[..., "AbstractAsyncContextManager[Running]"]


@pytest.fixture
def start() -> Start:
    """Starts a real server in this process on a free port; settings are keyword arguments."""

    return serving_here


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder with a short path, since the path of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="safelight-", dir="/tmp") as folder:
        yield Path(folder)


@asynccontextmanager
async def serving_here(*, wall: Callable[[], float] = time.time, **settings: object) -> AsyncIterator[Running]:
    """Runs a real server in this process on a free port; `wall` is its machine's clock."""
    given = {"port": 0, "models_dir": MODELS, "log_level": "error"} | settings
    async with serving(load(**given), wall) as running:
        yield running


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Polls until `condition` holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it never came true"
        await asyncio.sleep(0.005)
