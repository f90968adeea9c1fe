"""A server that drains for long, for tests of what its clients do."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import safelight
from safelight_server.app.server import Running

from tests.conftest import serving_here

DRAINS = {"runtime": "simulated", "drain_grace_s": 600.0, "simulated_base_ms": 250}
"""Of a server that drains for longer than a case takes, at its slowest."""


@contextlib.asynccontextmanager
async def draining(**settings: Any) -> AsyncIterator[Running]:
    """A server that has begun to drain; a long generation keeps it from ending."""
    async with serving_here(**settings | DRAINS) as running, safelight.Client(running.address) as client:
        stream = client.generate("what it waits for", steps=1000)
        assert isinstance(await anext(stream), safelight.Accepted)
        ended = running.drain(DRAINS["drain_grace_s"])
        yield running
        assert not ended.done(), "it drained all the time"
        await stream.aclose()
