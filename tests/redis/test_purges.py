"""Entries that replicas keep of generations beside the caches' are purged like these, and not kept longer than needed."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from safelight.v1 import cache_pb2, cache_pb2_grpc
from safelight.v1 import generation_pb2 as pb
from safelight_server.storage.sealed import parse_header

from tests.conftest import eventually
from tests.redis.test_ownership import Server, servers, suspend
from tests.redis.test_replicas import BYPASS, request
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture, until_step


async def purge(server: Server, **what: str) -> cache_pb2.PurgeCacheResponse:
    """Purges as an administrator."""
    async with grpc.aio.insecure_channel(server.running.address) as channel:
        return await cache_pb2_grpc.CacheServiceStub(channel).PurgeCache(cache_pb2.PurgeCacheRequest(**what))


async def kept_s(server: Server) -> dict[str, set[int]]:
    """The times to live of entries in the tiers, by kind, after all writes have ended."""
    running = server.running
    leased_runners, owners = running.generations._planner._leased_runners, running.generations.ownership.owners
    await eventually(lambda: not leased_runners._tasks and not owners._ending and not running.cache._writes)
    tiers = owners._context.tiers
    await tiers.flush()
    found: dict[str, set[int]] = {}
    for tier in tiers.tiers:
        async for key in tier.store.keys(""):
            header = parse_header(await tier.store.head(key) or b"")
            assert header is not None
            found.setdefault(key.split("/")[1], set()).add(round(header.expires_at - time.time()))
    return found


async def branched(server: Server) -> pb.GenerateRequest:
    """A request that starts from a latent of another generation."""
    events = await collect(server.stub.Generate(request(1, 10)))
    await kept_s(server)
    return request(3, 10, branch=pb.Branch(generation=events[0].generation, step=4))


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
        await kept_s(one)
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
        for message in (await branched(one), request(2, 31)):
            call = one.stub.Generate(message)
            events = await until_step(call, 5)
            await suspend(one, call)
        assert {"artifact", "checkpoint", "picture", "start"} <= set(await kept_s(one))
        what = {"tenant": "default", "model_revision": revision(events)}[by]
        assert not (await purge(one, **{by: what})).failed_tiers
        assert await kept_s(one) == {}


async def test_what_shares_nothing_is_kept_for_as_long_as_it_can_be_watched_or_taken_over(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path, count=1, result_ttl_s=1000) as (one,):
        for message in (await branched(one), request(2, 4, cache=BYPASS)):
            await collect(one.stub.Generate(message))
        found = await kept_s(one)
        assert all(900 < left_s <= 1000 for left_s in found["result"])
        assert all(left_s > 80_000 for left_s in found["picture"])


async def test_what_an_output_begins_from_goes_with_its_record(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        message = await branched(one)
        await collect(one.stub.Generate(message))
        assert "start" not in await kept_s(one)
        call = one.stub.Generate(message)
        name = (await until_step(call, 5))[0].generation
        await suspend(one, call)
        assert "start" in await kept_s(one), "another replica goes on from it"
        await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name)))
        assert "start" not in await kept_s(other)


async def test_what_cannot_be_watched_again_is_written_down_all_the_same(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path, count=1, result_ttl_s=0) as (one,):
        await collect(one.stub.Generate(request(1, 4)))
        assert "artifact" in await kept_s(one), "its generation may go on elsewhere"
