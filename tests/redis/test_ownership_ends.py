"""Generations that have moved to another replica end there as at their first owner."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.domain.errors import UnavailableError
from safelight_server.domain.events import FinishReason, GenerationState
from safelight_server.domain.request import PreviewPolicy
from safelight_server.generations.generation import Generation
from safelight_server.generations.ownership import CANCEL, WANT, mirrors

from tests.conftest import eventually
from tests.integration.test_generate import kinds, reason_of
from tests.redis.test_ownership import STEPS, Server, servers, suspend
from tests.redis.test_replicas import BYPASS, request
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, sequences, until_step


async def moved(one: Server, other: Server, message: pb.GenerateRequest) -> tuple[Generation, grpc.aio.UnaryStreamCall]:
    """Makes a generation that `one` accepted and `other` owns; returns it with the stream that made it move."""
    call = one.stub.Generate(message)
    name = (await until_step(call, 2))[0].generation
    await suspend(one, call)
    watching = other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1))
    live = other.running.generations._live
    await asyncio.gather(watching.wait_for_connection(), eventually(lambda: name.partition("/")[2] in live))
    return live[name.partition("/")[2]], watching


async def settled(server: Server) -> None:
    await eventually(lambda: not server.running.generations.ownership.owners._ending)


async def test_a_request_id_is_free_again_after_an_end_that_says_try_again(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        message = request(1, 1000, request_id=str(uuid.uuid4()), cache=BYPASS)
        generation, watching = await moved(one, other, message)
        generation.stop(UnavailableError("no server is there"), FinishReason.FAILED)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(watching)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await settled(other)
        for server in (one, other):
            again = server.stub.Generate(message)
            assert (await until_step(again, 2))[0].generation != generation.name
            again.cancel()


async def test_a_request_id_is_remembered_for_its_time_after_any_other_end(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path, idempotency_ttl_s=100.0) as (one, other):
        message = request(2, STEPS, request_id=str(uuid.uuid4()), cache=BYPASS)
        generation, watching = await moved(one, other, message)
        assert sequences(await collect(watching)) == [2, 3]
        await settled(other)
        client = one.coordinator._redis
        [claim] = [key async for key in client.scan_iter("safelight:run:claim:*")]
        assert 0 < await client.pttl(claim) <= 100_000
        assert (await collect(one.stub.Generate(message)))[0].generation == generation.name


async def test_a_stream_that_is_lost_again_suspends_it_again(redis_server: RedisServer, tmp_path: Path) -> None:
    grace = pb.DisconnectPolicy()
    grace.resume_grace.FromMilliseconds(2000)
    async with servers(redis_server.url, tmp_path) as (one, other):
        generation, watching = await moved(one, other, request(3, 1000, disconnect=grace, cache=BYPASS))
        await until_step(watching, 4)
        assert generation.state is GenerationState.RUNNING
        watching.cancel()
        await eventually(lambda: generation.state is GenerationState.SUSPENDED)
        await eventually(lambda: not other.running.inspect().outputs)
        await eventually(lambda: generation.state is GenerationState.CANCELLED)


async def test_nothing_is_developed_for_a_stream_that_was_lost_at_once(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        call = one.stub.Generate(request(4, 1000, cache=BYPASS))
        name = (await until_step(call, 2))[0].generation.partition("/")[2]
        caller = one.running.generations._live[name].caller
        there = other.running.generations
        generation = await there.find(caller, name)
        watcher = there.attach(generation, PreviewPolicy(), lambda _error: None)
        there.detach(watcher)
        await eventually(lambda: not there.ownership._tasks)
        assert all(output.idle for output in generation.outputs)
        assert not there._engine.scheduler.num_outputs
        call.cancel()


async def test_a_drained_replica_develops_nothing_that_it_has_shown_for_another(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        one.running.generations.ownership.bulletin._handlers.pop(WANT)  # so that its owner does not hand it over
        call = one.stub.Generate(request(5, 1000, cache=BYPASS))
        name = (await until_step(call, 2))[0].generation
        await suspend(one, call)
        watching = other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1))
        await until_step(watching, 6)
        await other.running.drain(0.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(watching)
        assert reason_of(caught.value) == "MOVED"
        assert not other.running.inspect().outputs


async def test_a_cancel_is_answered_though_its_caller_looks_no_more(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        call = one.stub.Generate(request(6, 1000, cache=BYPASS))
        name = (await until_step(call, 2))[0].generation
        watching = other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name))
        await until_step(watching, 4)
        bulletin = one.running.generations.ownership.bulletin
        heard, hear = asyncio.Event(), bulletin._handlers[CANCEL]
        bulletin.subscribe(CANCEL, lambda *_bulletin: heard.set())  # notification takes a while
        cancelling = other.stub.CancelGeneration(pb.CancelGenerationRequest(name=name))
        await heard.wait()
        watching.cancel()
        await eventually(lambda: not other.running.inspect().streams)
        hear(name.partition("/")[2], {})
        assert (await cancelling).generation.state == pb.Generation.STATE_CANCELLED
        assert not len(other.running.generations.ownership.mirrors)
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(call)


async def test_a_cancel_that_nobody_answers_is_no_success(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "ANSWER_S", 0.0)
    async with servers(redis_server.url, tmp_path, lease_ttl_s=0.5) as (one, other):
        call = one.stub.Generate(request(7, 1000, cache=BYPASS))
        name = (await until_step(call, 2))[0].generation
        one.running.generations.ownership.bulletin._handlers.pop(CANCEL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await other.stub.CancelGeneration(pb.CancelGenerationRequest(name=name))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not len(other.running.generations.ownership.mirrors)
        call.cancel()


async def test_a_finished_generation_without_its_picture_is_not_shown_as_complete(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        message = request(8, STEPS, request_id=str(uuid.uuid4()), cache=BYPASS)
        events = await collect(one.stub.Generate(message))
        await settled(one)
        client = one.coordinator._redis
        [artifact] = [key async for key in client.scan_iter("safelight:cache:*/artifact/*")]
        await client.delete(artifact)
        watch = pb.WatchGenerationRequest(name=events[0].generation)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(other.stub.WatchGeneration(watch))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(other.stub.Generate(message))
        assert caught.value.code() is not grpc.StatusCode.UNAVAILABLE
        got = (await other.stub.GetGeneration(pb.GetGenerationRequest(name=watch.name))).generation
        assert got.state == pb.Generation.STATE_SUCCEEDED
        assert kinds(await collect(one.stub.WatchGeneration(watch)))[-1] == "finished", "where it was finished it is"


async def test_a_stream_is_not_told_of_a_picture_that_is_gone(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        call = one.stub.Generate(request(9, STEPS, cache=BYPASS))
        name = (await until_step(call, 2))[0].generation
        watching = other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name))
        await until_step(watching, 4)
        tiers = other.running.generations.ownership.owners._context.tiers
        look = tiers.get
        tiers.get = lambda key, *a, **k: look(f"{key}-gone" if "/artifact/" in key else key, *a, **k)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(watching)
        assert reason_of(caught.value) == "MOVED"
        assert (await collect(call))[-1].finished.status.code == 0
