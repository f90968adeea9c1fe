"""A server that drains for a long time, for tests of clients."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import safelight
from safelight_server.app.server import Running

from tests.conftest import serving_here

DRAINS = {"runtime": "simulated", "drain_grace_s": 600.0, "simulated_base_ms": 250}
"""Settings of a server that drains for longer than any case takes."""


@contextlib.asynccontextmanager
async def draining(**settings: Any) -> AsyncIterator[Running]:
    """Runs a server that has begun to drain; a long generation keeps it from ending."""
    async with serving_here(**settings | DRAINS) as running, safelight.Client(running.address) as client:
        stream = client.generate("what it waits for", steps=1000)
        assert isinstance(await anext(stream), safelight.Accepted)
        ended = running.drain(DRAINS["drain_grace_s"])
        yield running
        assert not ended.done(), "it drained all the time"
        await stream.aclose()
