"""Models that are served on the torch runtime, and calls of it that are held."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from safelight import Accepted, Client, GenerationError, Progress
from safelight_server.app.server import Running, serving
from safelight_server.domain.component import Component
from safelight_server.settings import load


def served_on_torch(models: Path, **settings: Any) -> Any:
    """A server of a folder of models, on a free port, as a context."""
    given = {"port": 0, "models_dir": models, "runtime": "torch", "num_instances": 2, "log_level": "error"}
    return serving(load(**given | settings))


async def cancel_in_a_call(running: Running, monkeypatch: pytest.MonkeyPatch, prompt: str, **options: Any) -> None:
    """Begins a generation and cancels it while a call of the denoiser is under way, held until the cancelling is done."""
    cancelled, run = asyncio.Event(), running.runtime.run

    async def held(instance: int, model: str, component: Component, inputs: Any) -> Any:
        found = await run(instance, model, component, inputs)
        if component is Component.DENOISER and seen:
            await cancelled.wait()
        return found

    monkeypatch.setattr(running.runtime, "run", held)
    seen: list[Progress] = []
    async with Client(running.address) as client:
        with pytest.raises(GenerationError, match="CANCELLED"):
            async for event in client.generate(prompt, seed=1, steps=50, **options):
                if isinstance(event, Accepted):
                    generation = event.generation
                elif isinstance(event, Progress) and not seen:
                    seen.append(event)
                    await client.cancel(generation)
                    cancelled.set()
