"""How long the triton runtime waits for servers when it starts."""

from __future__ import annotations

from unittest.mock import AsyncMock

import pytest
from safelight_server.catalog import catalog
from safelight_server.runtime.triton import TritonOptions, TritonRuntime
from structlog.testing import capture_logs

from tests.conftest import MODELS


async def test_a_server_that_answers_nothing_takes_no_longer_than_the_start_may() -> None:
    runtime = TritonRuntime(catalog.load(MODELS, ""), TritonOptions(("127.0.0.1:1",), start_s=7.0))
    assert runtime._canary_limit_s() == 7.0
    await runtime.close()


async def test_a_probe_that_fails_in_an_unforeseen_way_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its server would count as being probed for ever."""
    runtime = TritonRuntime(catalog.load(MODELS, ""), TritonOptions(("127.0.0.1:1",), start_s=7.0))
    monkeypatch.setattr(runtime.servers[0], "probe", AsyncMock(side_effect=ZeroDivisionError("of a malformed answer")))
    assert list(runtime.endpoints.probe(runtime._clock())) == [0]
    with capture_logs() as logs:
        await runtime._probe(0)
    assert [entry["event"] for entry in logs] == ["bug", "server_not_usable"]
    assert runtime.endpoints.next_probe() is not None
    await runtime.close()
