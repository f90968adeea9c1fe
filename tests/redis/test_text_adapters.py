"""Adapters that change the text encoder, on two replicas: one finds what the other has made with the same adapters alone."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.domain.component import Component

from tests.conftest import eventually, serving_here
from tests.integration.test_generate import pixels
from tests.integration.test_text_adapters import KINDS, adapted, idle, write_kind
from tests.redis.test_ownership import Server, server_settings
from tests.support.conditions import NAME, models_with_conditions, serving_conditions
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect

R = pb.CacheResult
PROMPT = "a wooden bow and a blue gem"
SEEDS = itertools.count(100)


class CountingServer(Server):
    """A replica that counts the prompts that it has encoded."""

    def __init__(self, running: Any, channel: grpc.aio.Channel) -> None:
        super().__init__(running, channel)
        self.encoded = 0
        run = running.runtime.run

        async def counted(instance: int, model: str, component: Component, inputs: Mapping[str, Any]) -> Any:
            if component is Component.TEXT_ENCODER:
                self.encoded += len(inputs["input_ids"])
            return await run(instance, model, component, inputs)

        running.runtime.run = counted

    async def draws(self, seed: int, **scales: float) -> tuple[np.ndarray, int, int]:
        """The picture, what the cache had of it, and how many prompts were encoded for it."""
        before = self.encoded
        events = await collect(self.stub.Generate(adapted(seed, PROMPT, cached=True, **scales)))
        await idle(self.running)
        return pixels(events), events[-1].finished.cache_results[0].disposition, self.encoded - before


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_with_conditions(tmp_path_factory.mktemp("text_adapters"))


def adapters(folder: Path, **kinds: str) -> Path:
    """A folder of adapters by name, each of a kind."""
    for name, kind in kinds.items():
        write_kind(folder, name, *KINDS[kind])
    return folder


@contextlib.asynccontextmanager
async def replica(redis_url: str, models: Path, folder: Path, adapters: Path) -> AsyncIterator[CountingServer]:
    given = server_settings(redis_url, folder) | {"runtime": "onnx", "models_dir": models, "adapters_dir": adapters}
    async with serving_here(**given) as running, grpc.aio.insecure_channel(running.address) as channel:
        server = CountingServer(running, channel)
        # Encodes what all prompts need once; with a seed of its own, as the picture is found otherwise.
        await collect(server.stub.Generate(adapted(next(SEEDS), "a brass key", cached=True)))
        await idle(running)
        yield server


async def drawn_alone(models: Path, adapters: Path, seed: int, *kinds: dict[str, float]) -> list[np.ndarray]:
    """The pictures that a server makes which shares nothing, and which has kept nothing."""
    async with serving_conditions(models, adapters_dir=adapters) as (_, _, stub):
        return [pixels(await collect(stub.Generate(adapted(seed, PROMPT, **scales)))) for scales in kinds]


async def test_a_replica_finds_what_another_has_made_with_the_same_adapter_and_factor_alone(
    redis_server: RedisServer, models: Path, tmp_path: Path
) -> None:
    folder = adapters(tmp_path / "adapters", word="word", other="other", both="both")
    others = [{}, {"word": 0.5}, {"other": 1.0}, {"word": 1.0, "other": 1.0}, {"both": 1.0}]
    async with (
        replica(redis_server.url, models, tmp_path, folder) as one,
        replica(redis_server.url, models, tmp_path, folder) as two,
    ):
        made, disposition, encoded = await one.draws(1, word=1.0)
        assert disposition == R.DISPOSITION_MISS
        assert encoded
        found, disposition, encoded = await two.draws(1, word=1.0)
        assert (disposition, encoded) == (R.DISPOSITION_EXACT, 0)
        assert np.array_equal(found, made)
        fresh, disposition, encoded = await two.draws(2, word=1.0)
        assert (disposition, encoded) == (R.DISPOSITION_MISS, 0), (
            "another picture, of the embeddings of the first replica"
        )
        drawn = [await two.draws(1, **scales) for scales in others]
    assert [disposition for _, disposition, _ in drawn] == [R.DISPOSITION_MISS] * len(others)
    assert all(encoded for (_, _, encoded), scales in zip(drawn, others, strict=True) if scales)
    alone = await drawn_alone(models, folder, 1, {"word": 1.0}, *others)
    assert all(np.array_equal(one, other) for one, other in zip([made, *(at for at, *_ in drawn)], alone, strict=True))
    assert len({picture.tobytes() for picture in alone}) == len(alone), "the adapters matter"
    [expected] = await drawn_alone(models, folder, 2, {"word": 1.0})
    assert np.array_equal(fresh, expected)


async def test_a_replica_with_another_file_under_the_same_name_finds_nothing_of_it(
    redis_server: RedisServer, models: Path, tmp_path: Path
) -> None:
    here, there = adapters(tmp_path / "here", style="word"), adapters(tmp_path / "there", style="other")
    async with (
        replica(redis_server.url, models, tmp_path, here) as one,
        replica(redis_server.url, models, tmp_path, there) as two,
    ):

        def offered(server: CountingServer) -> list[str]:
            return [file.sha256 for file in server.running.catalog.adapters.of(NAME).values()]

        made, *_ = await one.draws(3, style=1.0)
        found, disposition, encoded = await two.draws(3, style=1.0)
        assert disposition == R.DISPOSITION_MISS
        assert encoded == 2, "prompt and negative prompt with its own file; without adapters they are known"
        assert not np.array_equal(found, made)
        [expected] = await drawn_alone(models, there, 3, {"style": 1.0})
        assert np.array_equal(found, expected)
        adapters(there, style="word")
        await eventually(lambda: offered(two) == offered(one))
        found, disposition, encoded = await two.draws(3, style=1.0)
        assert (disposition, encoded) == (R.DISPOSITION_EXACT, 0)
        assert np.array_equal(found, made)
