"""Administrators read the caches' statistics and purge them: purged entries are not served, all others are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safelight import Client, GenerationError
from safelight.v1 import cache_pb2, cache_pb2_grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.api.identity import new_key

from tests.conftest import eventually, serving_here
from tests.integration.test_cache import LATENT, SIMILAR, R, ask, kept, result
from tests.integration.test_generate import BYPASS, collect, reason_of
from tests.support.pause import steps_paused

RED, REWORDED = "a red potion on a dark background", "red potion, dark background"
SWORD = "a blue sword on a white background"


class Studio:
    """A server with a tenant for each caller."""

    def __init__(self, running, channel, keys: dict[str, str]) -> None:
        self.running = running
        self._stub = stubs.GenerationServiceStub(channel)
        self.caches = cache_pb2_grpc.CacheServiceStub(channel)
        self.keys = keys

    def metadata(self, caller: str):
        return (("authorization", f"Bearer {self.keys[caller]}"),)

    async def ask(self, caller: str, message: pb.GenerateRequest):
        events = await collect(self._stub.Generate(message, metadata=self.metadata(caller)))
        await kept(self.running)
        return events

    async def disposition(self, caller: str, prompt: str, seed: int, policy: pb.CachePolicy | None = None) -> str:
        found = result(await self.ask(caller, ask(prompt, seed, policy)))
        return R.Disposition.Name(found.disposition).removeprefix("DISPOSITION_")

    async def purge(self, **what: str) -> cache_pb2.PurgeCacheResponse:
        return await self.caches.PurgeCache(cache_pb2.PurgeCacheRequest(**what), metadata=self.metadata("admin"))


pytestmark = pytest.mark.asyncio(loop_scope="module")
TENANTS = [f"tenant-{number}" for number in range(16)]


@contextlib.asynccontextmanager
async def opened(folder, **settings):
    made = {name: new_key(name, name, admin=name == "admin") for name in (*TENANTS, "admin")}
    file = folder / "keys.json"
    file.write_text(f'{{"keys": [{", ".join(entry for _, entry in made.values())}]}}')
    async with (
        serving_here(api_key_file=file, **settings) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        yield Studio(running, channel, {name: key for name, (key, _) in made.items()})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def studio(tmp_path_factory):
    """A server shared by all tests; each test uses its own tenants."""
    async with opened(tmp_path_factory.mktemp("keys"), cache_pools={"shared": TENANTS[-2:]}) as made:
        yield made


@pytest.fixture
def pair(_names=zip(TENANTS[::2], TENANTS[1::2])):
    """Two tenants that no other test uses."""
    return next(_names)


async def test_a_purged_tenant_has_nothing_left_and_others_keep_theirs(studio, pair):
    ann, bob = pair
    source = {}
    for caller in (ann, bob):
        source[caller] = (await studio.ask(caller, ask(RED, 1)))[0].generation
    purged = await studio.purge(tenant=ann)
    assert not purged.failed_tiers
    assert purged.tiers[0].name == "memory"
    assert purged.tiers[0].num_entries > 3, "a picture, embeddings, checkpoints and their list"
    for policy in (SIMILAR, LATENT):
        assert await studio.disposition(ann, RED, 2, policy) == "MISS"
        await studio.purge(tenant=ann)
    assert await studio.disposition(ann, RED, 1) == "MISS"
    await studio.purge(tenant=ann)
    message = ask("a blue potion", 1)
    message.branch.CopyFrom(pb.Branch(generation=source[ann], step=4))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await studio.ask(ann, message)
    assert reason_of(caught.value) == "CHECKPOINT_GONE"
    assert await studio.disposition(bob, RED, 1) == "EXACT"
    assert await studio.disposition(bob, REWORDED, 2, SIMILAR) == "SIMILAR"
    assert await studio.disposition(bob, REWORDED, 3, LATENT) == "LATENT"
    message.branch.generation = source[bob]
    assert result(await studio.ask(bob, message)).disposition == R.DISPOSITION_BRANCHED


async def test_a_purged_generation_is_not_served_and_the_tenants_others_are(studio, pair):
    ann, bob = pair
    first = (await studio.ask(ann, ask(RED, 1)))[0].generation
    await studio.ask(ann, ask(SWORD, 1))
    await studio.purge(generation=first)
    assert await studio.disposition(ann, REWORDED, 2, SIMILAR) == "MISS"
    await studio.purge(tenant=bob)
    assert await studio.disposition(ann, SWORD, 1) == "EXACT"
    assert await studio.disposition(ann, "blue sword, white background", 2, SIMILAR) == "SIMILAR"
    assert await studio.disposition(ann, RED, 1) == "MISS"


async def test_a_picture_begun_from_a_latent_is_served_as_similar_and_purged_with_its_generation(studio, pair):
    ann, _ = pair
    await studio.ask(ann, ask(RED, 1))
    near = await studio.ask(ann, ask("a red potion with sparkles on a dark background", 2, LATENT))
    assert result(near).disposition == R.DISPOSITION_LATENT
    again = ask("red potion, dark background, sparkles", 3, SIMILAR)
    again.cache.min_similarity = 0.6
    found = result(await studio.ask(ann, again))
    assert (found.disposition, found.source) == (R.DISPOSITION_SIMILAR, near[0].generation)
    await studio.purge(generation=near[0].generation)
    found = result(await studio.ask(ann, again))
    assert found.source != near[0].generation
    assert found.disposition == R.DISPOSITION_LATENT, "the first picture is still there to start from"


async def test_a_purge_by_model_revision_covers_that_revision_only(studio, pair):
    ann, bob = pair
    events = await studio.ask(ann, ask(RED, 1))
    spec = events[0].accepted.spec
    revision = f"{spec.model.removeprefix('models/')}/{events[0].accepted.model_revision}"
    assert (await studio.purge(model_revision="icons/none")).tiers[0].num_entries == 0
    assert (await studio.purge(model_revision=revision, tenant=bob)).tiers[0].num_entries == 0
    assert await studio.disposition(ann, RED, 1) == "EXACT"
    assert (await studio.purge(model_revision=revision)).tiers[0].num_entries > 3
    assert await studio.disposition(ann, RED, 1) == "MISS"


async def test_a_purge_of_a_pooled_tenant_clears_its_pool(studio):
    ann, bob = TENANTS[-2:]
    await studio.ask(ann, ask(RED, 1))
    assert await studio.disposition(bob, RED, 1) == "EXACT"
    await studio.purge(tenant=bob)
    assert await studio.disposition(bob, RED, 2, SIMILAR) == "MISS"
    assert await studio.disposition(ann, RED, 1) == "MISS"


async def test_only_administrators_may(studio):
    ann = bob = TENANTS[0]
    for call, request in (
        (studio.caches.GetCacheStats, cache_pb2.GetCacheStatsRequest()),
        (studio.caches.PurgeCache, cache_pb2.PurgeCacheRequest(tenant=bob)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request, metadata=studio.metadata(ann))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert reason_of(caught.value) == "ADMIN_ONLY"


async def test_figures_count_each_kind_once_and_on_loopback_all_may_see_them(start):
    async with start() as running, Client(running.address) as client:
        stub = client.generations
        await collect(stub.Generate(ask(RED, 1)))
        await kept(running)
        with steps_paused(running):
            both = [asyncio.create_task(collect(stub.Generate(ask(SWORD, 1)))) for _ in range(2)]
            await eventually(lambda: running.inspect().live == 2)
        await asyncio.gather(*both)
        for prompt, seed, policy in (
            (RED, 1, None),
            (REWORDED, 2, SIMILAR),
            (REWORDED, 3, LATENT),
            (RED, 1, BYPASS),
            ("a blue potion on a dark background", 5, SIMILAR),
        ):
            await collect(stub.Generate(ask(prompt, seed, policy)))
            await kept(running)
        stats = await client.cache_stats()
        counted = {hits.kind: (hits.num_outputs, hits.num_steps_saved) for hits in stats.hits}
        assert counted["exact"] == (1, 10)
        assert counted["similar"] == (1, 10)
        assert counted["branched"] == (0, 0)
        assert counted["coalesced"][0] == 1
        assert 0 < counted["coalesced"][1] <= 10
        assert counted["latent"][0] in (1, 2)
        assert all(hits.compute_saved.ToNanoseconds() > 0 for hits in stats.hits if hits.num_outputs)
        memory = stats.tiers[0]
        assert (memory.name, memory.num_entries > 5, memory.num_bytes > 10_000) == ("memory", True, True)
        lookups = {lookups.kind: lookups for lookups in stats.lookups}
        assert lookups["exact"].num_lookups == 7
        assert lookups["approximate"].num_lookups == 3
        assert lookups["exact"].p50.ToNanoseconds() <= lookups["exact"].p99.ToNanoseconds()
        assert stats.num_guard_rejections >= 0


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ({}, "tenant"),
        ({"tenant": "a b"}, "tenant"),
        ({"model_revision": "icons"}, "model_revision"),
        ({"generation": "x"}, "generation"),
    ],
)
async def test_a_purge_that_says_nothing_or_nonsense_is_refused(simulated, what, field):
    async with Client(simulated.address) as client:
        with pytest.raises(GenerationError) as caught:
            await client.purge_cache(**what)
        assert list(caught.value.violations) == [field]


async def test_the_service_is_listed(simulated):
    async with grpc.aio.insecure_channel(simulated.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="safelight.v1.CacheService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("stats",), 0, "approximate"),
        (("purge", "--tenant", "default"), 0, "deleted 0 from memory"),
        (("purge",), 2, "safelight: tenant: one of tenant, model_revision and generation must be set"),
        (("purge", "--model-revision", "icons"), 2, "safelight: model_revision: must be MODEL/REVISION"),
        (("stats", "--target", "127.0.0.1:1"), 1, "safelight: UNAVAILABLE"),
    ],
)
async def test_the_command_line_says_it_in_one_line(simulated, arguments, code, said):
    command = (sys.executable, "-m", "safelight_server.cli.main", "cache", *arguments)
    environment = {**os.environ, "SAFELIGHT_TARGET": simulated.address}
    ran = await asyncio.create_subprocess_exec(*command, env=environment, stdout=PIPE, stderr=PIPE)
    out, errors = (part.decode() for part in await ran.communicate())
    assert ran.returncode == code, errors
    assert said in (errors if code else out)
    assert errors.count("\n") == (1 if code else 0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def simulated():
    """A server that needs no model, for tests of calls."""
    async with serving_here(runtime="simulated") as running:
        yield running
