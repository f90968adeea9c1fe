"""Lets the generations of a server in this process stand still while a test looks at them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safelight_server.app.server import Running
from safelight_server.domain.component import Component


@contextmanager
def steps_paused(running: Running) -> Iterator[None]:
    """No step begins during the block, so that no generation ends, however slow the machine is. All else goes on."""
    runtime, ended = running.runtime, asyncio.Event()
    run, own = runtime.run, vars(runtime).get("run")

    async def paused(instance: int, model: str, component: Component, inputs: Any) -> Any:
        if component is Component.DENOISER:
            await ended.wait()
        return await run(instance, model, component, inputs)

    runtime.run = paused  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del runtime.run
        else:
            runtime.run = own  # type: ignore[method-assign]
        ended.set()
