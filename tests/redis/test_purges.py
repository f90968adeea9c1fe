"""Purges on several replicas: what is kept of generations beside the caches goes too."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from safelight.v1 import cache_pb2, cache_pb2_grpc
from safelight.v1 import generation_pb2 as pb

from tests.conftest import eventually
from tests.redis.test_fleet import Server, servers
from tests.redis.test_replicas import request
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture, until_step


async def purge(server: Server, **what: str) -> cache_pb2.PurgeCacheResponse:
    """By an administrator."""
    async with grpc.aio.insecure_channel(server.running.address) as channel:
        return await cache_pb2_grpc.CacheServiceStub(channel).PurgeCache(cache_pb2.PurgeCacheRequest(**what))


async def kinds(server: Server) -> set[str]:
    """Of entries that are in some tier, when all that was to be written is."""
    running = server.running
    await eventually(lambda: not running.generations._intake._flights._tasks and not running.cache._writes)
    tiers = running.generations.fleet.owners._ground.tiers
    await tiers.flush()
    return {key.split("/")[1] for tier in tiers.tiers async for key in tier.store.keys("")}


def revision(events: list[pb.GenerationEvent]) -> str:
    accepted = events[0].accepted
    return f"{accepted.spec.model.removeprefix('models/')}/{accepted.model_revision}"


@pytest.mark.parametrize("by", ["tenant", "generation", "model_revision"])
async def test_a_purged_picture_is_not_shown_again_by_another_replica(
    redis_server: RedisServer, tmp_path: Path, by: str
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        events = await collect(one.stub.Generate(request(1, 4)))
        watch = pb.WatchGenerationRequest(name=events[0].generation)
        await kinds(one)
        what = {"tenant": "default", "generation": watch.name, "model_revision": revision(events)}[by]
        assert not (await purge(one, **{by: what})).failed_tiers
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(other.stub.WatchGeneration(watch))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert picture(await collect(one.stub.WatchGeneration(watch))) == picture(events), "where it was finished"


@pytest.mark.parametrize("by", ["tenant", "model_revision"])
async def test_nothing_is_left_of_what_was_finished_suspended_and_branched(
    redis_server: RedisServer, tmp_path: Path, by: str
) -> None:
    async with servers(redis_server.url, tmp_path, count=1) as (one,):
        finished = await collect(one.stub.Generate(request(1, 10)))
        await kinds(one)
        branch = pb.Branch(generation=finished[0].generation, step=4)
        for message in (request(2, 31), request(3, 10, branch=branch)):
            call = one.stub.Generate(message)
            await until_step(call, 5)
            call.cancel()
        await eventually(lambda: len(one.running.generations._lost) == 2)
        assert {"artifact", "checkpoint", "picture", "start"} <= await kinds(one)
        what = {"tenant": "default", "model_revision": revision(finished)}[by]
        assert not (await purge(one, **{by: what})).failed_tiers
        assert await kinds(one) == set()
