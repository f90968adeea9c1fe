"""What one replica has developed serves similar requests of another: pictures at once, latents after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.identity import new_key

from tests.conftest import eventually
from tests.redis.test_fleet import Server, servers
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture

pytestmark = pytest.mark.timeout(180)
R = pb.CacheResult
ICONS = {"runtime": "onnx", "simulated_base_ms": 0}
STEPS = 10


def request(prompt: str, mode: int, seed: int) -> pb.GenerateRequest:
    spec = pb.GenerationSpec(prompt=prompt, num_inference_steps=STEPS, outputs=[pb.OutputSpec(seed=seed)])
    cache = pb.CachePolicy(mode=mode)
    if mode == pb.CachePolicy.MODE_ALLOW_SIMILAR:
        cache.min_similarity = 0.7
    return pb.GenerateRequest(spec=spec, cache=cache)


async def ask(server: Server, prompt: str, mode: int, seed: int, metadata: object = None) -> list[pb.GenerationEvent]:
    return await collect(server.stub.Generate(request(prompt, mode, seed), metadata=metadata))


def result(events: list[pb.GenerationEvent]) -> pb.CacheResult:
    [found] = events[-1].finished.cache_results
    return found


async def settled(server: Server) -> None:
    """What was developed is kept."""
    await eventually(lambda: not server.running.generations._live and not server.running.cache._writes)


async def test_a_picture_of_one_is_served_as_similar_by_the_other(redis_server: RedisServer, tmp_path: Path) -> None:
    pairs = [new_key(name, name) for name in ("ann", "bob")]
    keys = tmp_path / "api.json"
    keys.write_text(json.dumps({"keys": [json.loads(entry) for _, entry in pairs]}))
    ann, bob = ((("authorization", f"Bearer {key}"),) for key, _ in pairs)
    similar = pb.CachePolicy.MODE_ALLOW_SIMILAR
    async with servers(redis_server.url, tmp_path, api_key_file=keys, **ICONS) as (one, other):
        first = await ask(one, "a glowing red potion on a dark background", similar, 1, ann)
        assert result(first).disposition == R.DISPOSITION_MISS
        await settled(one)
        again = await ask(other, "a red potion, glowing, on a dark background", similar, 2, ann)
        assert result(again).disposition == R.DISPOSITION_SIMILAR
        assert result(again).source == first[0].generation
        assert result(again).similarity >= 0.7
        assert picture(again) == picture(first)
        assert again[-1].finished.usage.num_steps == 0
        blue = await ask(other, "a blue potion, glowing, on a dark background", similar, 3, ann)
        assert result(blue).disposition != R.DISPOSITION_SIMILAR, "the words do not agree"
        theirs = await ask(other, "a red potion, glowing, on a dark background", similar, 2, bob)
        assert result(theirs).disposition == R.DISPOSITION_MISS, "nothing approximate crosses tenants"
        assert picture(theirs) != picture(first)


async def test_a_latent_of_one_starts_an_output_of_another_that_came_later(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    latent = pb.CachePolicy.MODE_ALLOW_LATENT
    async with servers(redis_server.url, tmp_path, count=1, **ICONS) as [one]:
        first = await ask(one, "a glowing red potion on a dark background", latent, 1)
        assert result(first).disposition == R.DISPOSITION_MISS
        await settled(one)
    async with servers(redis_server.url, tmp_path, count=1, **ICONS) as [later]:
        await ask(later, "a wooden shield on a light background", latent, 2)
        await later.running.cache._starts.rebuilt()
        second = await ask(later, "a red potion, glowing, on a dark background", latent, 3)
        assert result(second).disposition == R.DISPOSITION_LATENT
        assert result(second).similarity > 0.85, "nothing of its own is so near"
        skipped = result(second).num_steps_skipped
        assert 0 < skipped < STEPS
        assert second[-1].finished.usage.num_steps == STEPS - skipped
