"""Similar pictures and latents of two replicas with the real model: shared between replicas, not between tenants."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from safelight.v1 import cache_pb2, cache_pb2_grpc
from safelight.v1 import generation_pb2 as pb
from safelight_server.api.identity import new_key
from safelight_server.storage.sealed import parse_header
from safelight_server.storage.tiers import Tiers

from tests.integration.test_cache import LATENT, SIMILAR, R, ask, kept
from tests.redis.test_ownership import Server, servers
from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture

RED, REWORDED = "a red potion on a dark background", "red potion, dark background"
BLUE = "a blue potion on a dark background"
EXACT = pb.CachePolicy(mode=pb.CachePolicy.MODE_DEFAULT)
PURGES = ("tenant", "generation", "model_revision")
TENANTS = (
    "similar",
    "latent",
    "ann",
    "keeps",
    *PURGES,
    *(f"bob{seed}{number}" for seed in range(3) for number in range(2)),
)
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Studio:
    """Two replicas and the keys of tenants; each test uses tenants of its own."""

    def __init__(self, both: list[Server], keys: dict[str, str]) -> None:
        self.one, self.other = both
        self._keys = keys

    async def ask(
        self, server: Server, who: str, prompt: str, seed: int, policy: pb.CachePolicy
    ) -> list[pb.GenerationEvent]:
        """Requests a generation of 10 steps."""
        return await self.send(server, who, ask(prompt, seed, policy))

    async def send(self, server: Server, who: str, message: pb.GenerateRequest) -> list[pb.GenerationEvent]:
        """Sends a request, and returns when all its results are stored in the caches."""
        metadata = (("authorization", f"Bearer {self._keys[who]}"),)
        events = await collect(server.stub.Generate(message, metadata=metadata))
        await kept(server.running)
        await tiers(server).flush()
        return events

    async def look_up(self, server: Server, who: str) -> None:
        """Makes a replica load the index of latents, as at a tenant's first request.

        The request has fewer steps, so that its own latents serve no other request.
        """
        message = ask("a star", 1, LATENT)
        message.spec.num_inference_steps = 4
        await self.send(server, who, message)
        await server.running.cache._warm_starts.rebuilt()

    async def disposition(self, server: Server, who: str, prompt: str, seed: int, policy: pb.CachePolicy) -> str:
        """The disposition of a generation of 10 steps."""
        found = result(await self.ask(server, who, prompt, seed, policy)).disposition
        return str(R.Disposition.Name(found)).removeprefix("DISPOSITION_")

    async def purge(self, server: Server, **what: str) -> cache_pb2.PurgeCacheResponse:
        """Purges at one replica, as an administrator."""
        metadata = (("authorization", f"Bearer {self._keys['admin']}"),)
        async with grpc.aio.insecure_channel(server.running.address) as channel:
            caches = cache_pb2_grpc.CacheServiceStub(channel)
            return await caches.PurgeCache(cache_pb2.PurgeCacheRequest(**what), metadata=metadata)


def tiers(server: Server) -> Tiers:
    """The tiers of a server."""
    found: Tiers = server.running.generations.ownership.owners._context.tiers
    return found


async def num_left(server: Server, generation: str) -> int:
    """Number of entries in memory and latents that a replica still has of a generation."""
    tag = server.running.generations.ownership.owners._context.keyring.tag("generation", generation)
    memory = tiers(server).tiers[0].store
    headers = [parse_header(await memory.head(key) or b"") async for key in memory.keys("")]
    places = server.running.cache._warm_starts._place.values()
    return sum(h is not None and h.generation == tag for h in headers) + sum(p.owner.generation == tag for p in places)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def studio(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    """Shared by all tests, since two real models take long to be measured at start."""
    folder = tmp_path_factory.mktemp("studio")
    made = {name: new_key(name, name, admin=name == "admin") for name in (*TENANTS, "admin")}
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
    await studio.ask(studio.one, "latent", RED, 1, EXACT)
    await studio.look_up(studio.other, "latent")
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
            await studio.look_up(server, who)
            events = await studio.ask(server, who, RED, seed % 2, policy)
            assert result(events).disposition == R.DISPOSITION_MISS
            assert events[-1].finished.usage.num_steps == 10


@pytest.mark.parametrize("by", PURGES)
async def test_what_is_purged_on_one_replica_is_gone_on_the_other(studio: Studio, by: str) -> None:
    """The other replica had a copy in memory and latents in its index. Another tenant's entries stay."""
    events = await studio.ask(studio.one, by, RED, 1, EXACT)
    name = events[0].generation
    await studio.ask(studio.one, "keeps", RED, 1, EXACT)
    await studio.look_up(studio.other, by)
    assert await studio.disposition(studio.other, by, RED, 1, EXACT) == "EXACT"
    assert await num_left(studio.other, name) >= 2
    model, revision = events[0].accepted.spec.model, events[0].accepted.model_revision
    what = {
        "tenant": by,
        "generation": name,
        "model_revision": f"{model.removeprefix('models/')}/{revision}",
    }[by]
    purged = await studio.purge(studio.one, **{by: what})
    assert purged.failed_tiers == []

    async def cleared() -> bool:
        return await num_left(studio.other, name) == 0

    await until(cleared)
    assert await studio.disposition(studio.other, by, REWORDED, 2, SIMILAR) == "MISS"
    assert await studio.disposition(studio.other, by, RED, 1, EXACT) == "MISS"
    left = "MISS" if by == "model_revision" else "EXACT"
    assert await studio.disposition(studio.other, "keeps", RED, 1, EXACT) == left
