"""Fixtures for all tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import hypothesis
import pytest

try:
    from safelight_server.app import Running, serving
    from safelight_server.settings import load
except ImportError:  # the training environment has no server dependencies; its tests use none of these
    pass

hypothesis.settings.register_profile("safelight", deadline=None)  # machines are shared: no test asserts a time
hypothesis.settings.load_profile("safelight")

MODELS = Path(__file__).parent.parent / "models"
Start = Callable[..., "AbstractAsyncContextManager[Running]"]


@pytest.fixture
def start() -> Start:
    """Starts a real server of this process on a free port; settings as keywords."""

    return serving_here


@asynccontextmanager
async def serving_here(**settings: object) -> AsyncIterator[Running]:
    """A real server of this process on a free port."""
    given = {"port": 0, "models_dir": MODELS, "log_level": "error"} | settings
    async with serving(load(**given)) as running:
        yield running


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Polls until `condition` holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it never came true"
        await asyncio.sleep(0.005)
