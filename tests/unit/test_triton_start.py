"""How long the triton runtime waits for servers when it starts."""

from __future__ import annotations

from safelight_server.catalog import catalog
from safelight_server.runtime.triton import TritonOptions, TritonRuntime

from tests.conftest import MODELS


async def test_a_server_that_answers_nothing_takes_no_longer_than_the_start_may() -> None:
    runtime = TritonRuntime(catalog.load(MODELS, ""), TritonOptions(("127.0.0.1:1",), start_s=7.0))
    assert runtime._canary_limit_s() == 7.0
    await runtime.close()
