"""Two replicas with the real model: what one made is similar enough for the other, and begins its latents; tenants apart."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from safelight.v1 import generation_pb2 as pb
from safelight_server.identity import new_key

from tests.integration.test_cache import LATENT, SIMILAR, R, ask, kept
from tests.redis.test_fleet import Server, servers
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture

RED, REWORDED = "a red potion on a dark background", "red potion, dark background"
BLUE = "a blue potion on a dark background"
EXACT = pb.CachePolicy(mode=pb.CachePolicy.MODE_DEFAULT)
TENANTS = ("similar", "latent", "ann", *(f"bob{seed}{number}" for seed in range(3) for number in range(2)))
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Studio:
    """Two replicas, and the keys of tenants: each test has its own."""

    def __init__(self, both: list[Server], keys: dict[str, str]) -> None:
        self.one, self.other = both
        self._keys = keys

    async def ask(
        self, server: Server, who: str, prompt: str, seed: int, policy: pb.CachePolicy
    ) -> list[pb.GenerationEvent]:
        """A generation of 10 steps."""
        return await self.send(server, who, ask(prompt, seed, policy))

    async def send(self, server: Server, who: str, message: pb.GenerateRequest) -> list[pb.GenerationEvent]:
        """Everything that it leaves behind is kept when this returns."""
        metadata = (("authorization", f"Bearer {self._keys[who]}"),)
        events = await collect(server.stub.Generate(message, metadata=metadata))
        await kept(server.running)
        await server.running.generations.fleet.owners._ground.tiers.flush()
        return events


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def studio(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    """One for all tests: two real models take a while to be measured."""
    folder = tmp_path_factory.mktemp("studio")
    made = {name: new_key(name, name) for name in TENANTS}
    keys = folder / "api.json"
    keys.write_text('{"keys": [' + ",".join(entry for _, entry in made.values()) + "]}")
    redis = RedisServer(folder)
    redis.start()
    async with servers(redis.url, folder, runtime="onnx", api_key_file=keys) as both:
        yield Studio(both, {name: key for name, (key, _) in made.items()})
    redis.kill()


def result(events: list[pb.GenerationEvent]) -> pb.CacheResult:
    [only] = events[-1].finished.cache_results
    return only


async def test_a_picture_of_one_replica_is_served_as_similar_by_the_other(studio: Studio) -> None:
    source = await studio.ask(studio.one, "similar", RED, 1, EXACT)
    similar = await studio.ask(studio.other, "similar", REWORDED, 2, SIMILAR)
    found = result(similar)
    assert (found.disposition, found.source) == (R.DISPOSITION_SIMILAR, source[0].generation)
    assert picture(similar) == picture(source)
    assert similar[-1].finished.usage.num_rows == 0
    for prompt, policy in ((REWORDED, EXACT), (BLUE, SIMILAR)):
        other = await studio.ask(studio.other, "similar", prompt, 3, policy)
        assert result(other).disposition not in (R.DISPOSITION_SIMILAR, R.DISPOSITION_EXACT)


async def test_a_latent_of_one_replica_begins_a_picture_of_the_other(studio: Studio) -> None:
    """The other looks up what there is when its tenant first comes, here with a request that could start from nothing."""
    await studio.ask(studio.one, "latent", RED, 1, EXACT)
    opener = ask(REWORDED, 2, LATENT)
    opener.spec.num_inference_steps = 4
    await studio.send(studio.other, "latent", opener)
    await studio.other.running.cache._starts.rebuilt()
    events = await studio.ask(studio.other, "latent", REWORDED, 3, LATENT)
    found = result(events)
    assert found.disposition == R.DISPOSITION_LATENT
    assert 0 < found.num_steps_skipped <= 5
    assert events[-1].finished.usage.num_steps == 10 - found.num_steps_skipped
    at_home = await studio.ask(studio.one, "latent", REWORDED, 3, LATENT)
    assert result(at_home).num_steps_skipped == found.num_steps_skipped
    assert picture(at_home) == picture(events), "the same latent, the same noise: the same picture"


async def test_tenants_are_apart_on_all_replicas(studio: Studio) -> None:
    for seed, server in enumerate((studio.one, studio.other)):
        await studio.ask(server, "ann", RED, seed, EXACT)
    for seed, policy in enumerate((EXACT, SIMILAR, LATENT)):
        for number, server in enumerate((studio.one, studio.other)):
            who = f"bob{seed}{number}"
            await studio.ask(server, who, "a green sword on a white background", 9, LATENT)  # it looks up what there is
            await server.running.cache._starts.rebuilt()
            events = await studio.ask(server, who, RED, seed % 2, policy)
            assert result(events).disposition == R.DISPOSITION_MISS
            assert events[-1].finished.usage.num_steps == 10
