"""Outputs that start from a latent move to another replica: it uses that latent, or reports that it is gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.cluster.records import GenerationRecord
from safelight_server.domain.events import Disposition, Origin
from safelight_server.generations.generation import Generation
from safelight_server.generations.planner import OutputPlan
from safelight_server.storage.base import StoreUnavailableError
from safelight_server.storage.tiers import Tiers

from tests.conftest import eventually
from tests.integration.test_generate import reason_of
from tests.redis.test_ownership import STEPS, Server, servers, suspend
from tests.redis.test_replicas import BYPASS, request
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, picture, until_step

R = pb.CacheResult
BRANCHED_AT = 9


def other_prompt(seed: int) -> pb.GenerateRequest:
    message = request(seed, STEPS)
    message.spec.prompt = "a blue sword"
    return message


async def branch(server: Server) -> pb.GenerateRequest:
    """A request that branches from a finished generation."""
    source = await collect(server.stub.Generate(request(1, STEPS)))
    await eventually(lambda: not server.running.generations.ownership.owners._ending)
    message = other_prompt(2)
    message.branch.CopyFrom(pb.Branch(generation=source[0].generation, step=BRANCHED_AT))
    return message


async def let_go(server: Server, message: pb.GenerateRequest) -> pb.WatchGenerationRequest:
    """Starts a generation and leaves it suspended; returns the request that watches it."""
    call = server.stub.Generate(message)
    name = (await until_step(call, BRANCHED_AT + 3))[0].generation
    await suspend(server, call)
    return pb.WatchGenerationRequest(name=name, after_sequence=1)


def tiers(server: Server) -> Tiers:
    found: Tiers = server.running.generations.ownership.owners._context.tiers
    return found


async def lose_starts(server: Server) -> None:
    """Deletes the kept latents, as a full Redis may."""
    starts = [key for key in await tiers(server).keys("", 10_000) if "/start/" in key]
    assert starts
    for key in starts:
        await tiers(server).delete(key)


async def test_one_whose_latent_cannot_be_read_at_once_begins_from_it_all_the_same(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        message = await branch(one)
        expected = picture(await collect(one.stub.Generate(message)))
        watch = await let_go(one, message)
        store = tiers(other).tiers[-1].store
        get, failed = store.get, list[str]()

        async def fails_twice(key: str) -> bytes | None:
            if "/start/" in key and len(failed) < 2:
                failed.append(key)
                raise StoreUnavailableError("no answer in time")
            return await get(key)

        monkeypatch.setattr(store, "get", fails_twice)
        events = await collect(other.stub.WatchGeneration(watch))
        assert len(failed) == 2
        assert picture(events) == expected != b""
        [result] = events[-1].finished.cache_results
        assert (result.disposition, result.num_steps_skipped) == (R.DISPOSITION_BRANCHED, BRANCHED_AT)


async def test_a_branch_whose_latent_is_gone_fails(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        watch = await let_go(one, await branch(one))
        await lose_starts(one)
        for server in (other, one):  # who shows it says the same
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(server.stub.WatchGeneration(watch))
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert reason_of(caught.value) == "CHECKPOINT_GONE"


async def test_one_near_whose_latent_is_gone_is_developed_from_noise_and_says_so(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        message = await branch(one)
        planner = one.running.generations._planner
        find = planner.plan

        async def near(generation: Generation, branched_from: Generation | None) -> list[OutputPlan]:
            latent = Origin(Disposition.LATENT, 0.9, num_steps_skipped=BRANCHED_AT)
            return [replace(plan, origin=latent) for plan in await find(generation, branched_from)]

        monkeypatch.setattr(planner, "plan", near)
        watch = await let_go(one, message)
        await lose_starts(one)
        events = await collect(other.stub.WatchGeneration(watch))
        finished = events[-1].finished
        [result] = finished.cache_results
        assert (result.disposition, result.num_steps_skipped) == (R.DISPOSITION_MISS, 0)
        assert finished.usage.num_steps == STEPS
        plain = other_prompt(2)
        await eventually(lambda: not other.running.inspect().keeping)
        [kept] = (await collect(other.stub.Generate(plain)))[-1].finished.cache_results
        assert kept.disposition == R.DISPOSITION_EXACT
        plain.cache.CopyFrom(BYPASS)
        assert picture(await collect(other.stub.Generate(plain))) == picture(events)


@pytest.mark.parametrize("disposition", [Disposition.EXACT, Disposition.SIMILAR])
async def test_one_that_was_served_and_not_written_is_developed_and_says_so(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disposition: Disposition
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        watch = await let_go(one, request(5, STEPS, cache=BYPASS))
        revive = other.running.generations.revive

        def as_served(record: GenerationRecord) -> Generation:
            return revive(replace(record, origins=(Origin(disposition, source="generations/1"),)))

        monkeypatch.setattr(other.running.generations, "revive", as_served)
        shown = await collect(other.stub.WatchGeneration(watch))
        [found] = shown[-1].finished.cache_results
        assert (found.disposition, found.source) == (R.DISPOSITION_MISS, "")
