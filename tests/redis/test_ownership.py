"""Ownership with two servers in this process on one Redis: owners, separate tenants, and failures of Redis."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.api.identity import new_key
from safelight_server.app.server import Running
from safelight_server.storage.base import StoreUnavailableError
from structlog.testing import capture_logs

from tests.conftest import eventually, serving_here
from tests.redis.test_replicas import BYPASS, DETACH, request
from tests.support.coordination import until
from tests.support.pause import steps_paused
from tests.support.redis_server import RedisServer
from tests.support.replicas import bills, collect, key_file, picture, sequences, until_step

LEASE_S = 1.5
STEPS = 30


class Server:
    """One of the two servers."""

    def __init__(self, running: Running, channel: grpc.aio.Channel) -> None:
        self.running = running
        self.stub = stubs.GenerationServiceStub(channel)

    @property
    def coordinator(self):  # type: ignore[no-untyped-def]
        return self.running.generations.ownership.owners._context.coordinator


def server_settings(redis_url: str, folder: Path) -> dict[str, object]:
    return {
        "runtime": "simulated",
        "simulated_base_ms": 20,
        "num_instances": 1,
        "redis_url": redis_url,
        "redis_timeout_ms": 5000,
        "lease_ttl_s": LEASE_S,
        "breaker_open_s": 0.1,
        "cache_key_file": key_file(folder),
        "checkpoint_every_n_steps": 2,
    }


@contextlib.asynccontextmanager
async def servers(redis_url: str, folder: Path, count: int = 2, **settings: object) -> AsyncIterator[list[Server]]:
    given = server_settings(redis_url, folder) | settings
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            running = await stack.enter_async_context(serving_here(**given))
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(running.address, options))
            made.append(Server(running, channel))
        yield made


async def suspend(server: Server, call: grpc.aio.UnaryStreamCall) -> None:
    """Cancels a stream, and waits until its generation is suspended. It makes no step meanwhile, so it does not end."""
    with steps_paused(server.running):
        before = server.running.inspect().suspended
        call.cancel()
        await eventually(lambda: server.running.inspect().suspended > before)


async def undisturbed(server: Server, seed: int) -> bytes:
    return picture(await collect(server.stub.Generate(request(seed, STEPS, cache=BYPASS))))


async def test_a_generation_belongs_to_its_tenant_on_every_replica(redis_server: RedisServer, tmp_path: Path) -> None:
    pairs = [new_key(name, name) for name in ("ann", "bob")]
    keys = tmp_path / "api.json"
    keys.write_text('{"keys": [' + ",".join(entry for _, entry in pairs) + "]}")
    ann, bob = ((("authorization", f"Bearer {key}"),) for key, _ in pairs)
    async with servers(redis_server.url, tmp_path, api_key_file=keys) as (one, other):
        message = request(1, STEPS, request_id=str(uuid.uuid4()))
        call = one.stub.Generate(message, metadata=ann)
        name = (await until_step(call, 2))[0].generation
        for ask in (
            lambda: other.stub.GetGeneration(pb.GetGenerationRequest(name=name), metadata=bob),
            lambda: other.stub.CancelGeneration(pb.CancelGenerationRequest(name=name), metadata=bob),
            lambda: collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name), metadata=bob)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask()
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert not len(other.running.generations.ownership.mirrors), "what is refused is not followed"
        theirs = await collect(other.stub.Generate(message, metadata=bob))
        assert theirs[0].generation != name, "request ids are each tenant's own"
        assert (await collect(call))[-1].finished.status.code == 0


async def test_what_shares_nothing_moves_too(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        call = one.stub.Generate(request(2, STEPS, cache=BYPASS))
        before = await until_step(call, 8)
        await suspend(one, call)
        name = before[0].generation
        after = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1)))
        assert sequences(after) == [2, 3]
        assert not one.running.inspect().live, "it went where its stream is"
        assert picture(after) == await undisturbed(other, 2)
        assert [bill["generation"] for bill in await bills(redis_server.url, tmp_path)].count(name) == 1


async def test_one_whose_request_id_could_not_be_bound_promises_nothing(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):

        async def fails(*_arguments: object) -> bytes:
            raise StoreUnavailableError("no answer in time")

        monkeypatch.setattr(one.coordinator, "claim", fails)
        events = await collect(one.stub.Generate(request(40, 2, request_id=str(uuid.uuid4()))))
        assert events[0].accepted.durability == pb.Accepted.DURABILITY_LOCAL
        assert events[-1].finished.status.code == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await other.stub.GetGeneration(pb.GetGenerationRequest(name=events[0].generation))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_picture_that_cannot_be_read_at_once_is_shown_elsewhere_all_the_same(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        store = other.running.generations.ownership.owners._context.tiers.tiers[-1].store
        get, failed = store.get, list[str]()

        async def fails_twice(key: str) -> bytes | None:
            if "/artifact/" in key and len(failed) < 2:
                failed.append(key)
                raise StoreUnavailableError("no answer in time")
            return await get(key)

        monkeypatch.setattr(store, "get", fails_twice)
        call = one.stub.Generate(request(41, STEPS))
        name = (await until_step(call, 2))[0].generation
        screen = asyncio.create_task(collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name))))
        done, events = await collect(call), await screen
        assert len(failed) == 2
        assert picture(events) == picture(done) != b""
        assert sequences(events) == [1, 2, 3]


async def test_a_drained_replica_hands_its_generations_over(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        call = one.stub.Generate(request(3, STEPS))
        before = await until_step(call, 6)
        drained = one.running.drain(0.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        name = before[0].generation
        after = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=1)))
        await drained
        assert sequences(after) == [2, 3]
        assert 0 < after[-1].finished.usage.num_steps < STEPS
        assert picture(after) == await undisturbed(other, 3)


async def test_a_lost_one_is_cancelled_after_its_grace_whoever_has_it(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    grace = pb.DisconnectPolicy()
    grace.resume_grace.FromMilliseconds(300)
    async with servers(redis_server.url, tmp_path) as (one, other):
        call = one.stub.Generate(request(4, 1000, disconnect=grace))
        name = (await until_step(call, 2))[0].generation
        await one.running.drain(0.0)
        ownership = other.running.generations
        await eventually(lambda: name.partition("/")[2] in ownership._finished)
        got = (await other.stub.GetGeneration(pb.GetGenerationRequest(name=name))).generation
        assert got.state == pb.Generation.STATE_CANCELLED
        assert await other.coordinator.unowned() == []


@pytest.mark.parametrize("fault", ["killed", "hung", "restarted", "full"])
async def test_redis_fails_in_mid_work_and_generations_go_on(
    redis_server: RedisServer, tmp_path: Path, fault: str
) -> None:
    async with servers(redis_server.url, tmp_path, redis_timeout_ms=500 if fault == "hung" else 5000) as both:
        expected = [await undisturbed(both[0], 10 + n) for n in range(6)]
        calls = [both[n % 2].stub.Generate(request(10 + n, STEPS)) for n in range(6)]
        calls += [both[1 - n % 2].stub.Generate(request(10 + n, STEPS)) for n in range(3)]
        begun = await asyncio.gather(*(until_step(call, 4) for call in calls))
        with capture_logs() as lines:
            match fault:
                case "killed":
                    redis_server.kill()
                case "hung":
                    redis_server.freeze()
                case "restarted":
                    await asyncio.to_thread(redis_server.kill)
                    await asyncio.to_thread(redis_server.start)
                case "full":
                    async with Redis.from_url(redis_server.url) as admin:
                        await admin.config_set("maxmemory", 1)
            streams = await asyncio.gather(*(collect(call) for call in calls))
            fresh = await collect(both[0].stub.Generate(request(20, STEPS)))
        if fault == "hung":
            redis_server.thaw()
        for number, events in enumerate(streams):
            assert picture(events) == expected[number % 6]
            assert sequences(begun[number] + events) == [1, 2, 3]
        assert fresh[-1].finished.status.code == 0
        if fault in ("killed", "hung"):
            assert fresh[0].accepted.durability == pb.Accepted.DURABILITY_LOCAL
            assert sum(line["event"].startswith("service fails") for line in lines) <= 2, "one line a replica"


async def test_after_an_outage_what_was_developed_is_committed_once(redis_server: RedisServer, tmp_path: Path) -> None:
    async with servers(redis_server.url, tmp_path, redis_timeout_ms=500) as (one, _other):
        call = one.stub.Generate(request(30, STEPS, disconnect=DETACH))
        first = await until_step(call, 4)
        redis_server.freeze()
        events = await collect(call)
        assert events[-1].finished.status.code == 0
        redis_server.thaw()
        name = first[0].generation

        async def billed() -> int:
            return [bill["generation"] for bill in await bills(redis_server.url, tmp_path)].count(name)

        await until(billed)
        assert await billed() == 1


async def test_what_runs_is_written_again_after_redis_has_lost_its_data(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        message = request(9, 150, request_id=str(uuid.uuid4()), cache=BYPASS)
        call = one.stub.Generate(message)
        name = (await until_step(call, 2))[0].generation
        watch = pb.WatchGenerationRequest(name=name)
        watching = other.stub.WatchGeneration(watch)
        await until_step(watching, 4)
        await one.coordinator._redis.flushall()
        ended, shown = await asyncio.gather(collect(call), collect(watching))
        assert sequences(ended) == [2, 3] and sequences(shown) == [2, 3]
        for stub in (one.stub, other.stub):
            assert sequences(await collect(stub.WatchGeneration(watch))) == [1, 2, 3]
            again = await collect(stub.Generate(message))
            assert again[0].generation == name and picture(again) == picture(ended)
