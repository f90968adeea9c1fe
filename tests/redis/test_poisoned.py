"""Foreign data in Redis is skipped or removed, and valid data beside it is handled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis
from safelight.v1 import generation_pb2 as pb
from safelight_server.cache.approximate.buckets import PREFIX as BUCKETS
from safelight_server.cluster.bulletin import STREAM
from safelight_server.coordination.redis import PREFIX, REGISTRY, RedisCoordinator
from safelight_server.storage.base import MalformedValueError
from safelight_server.storage.breaker import BreakerState
from safelight_server.storage.redis import PREFIX as ENTRIES
from safelight_server.storage.redis import RedisConnection, RedisStore
from structlog.testing import capture_logs

from tests.conftest import eventually
from tests.redis.test_buckets import ANY, Make, kept, make
from tests.redis.test_ownership import LEASE_S, servers
from tests.redis.test_replicas import BYPASS, DETACH, request
from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.replicas import Replica, key_file, until_step
from tests.support.stores import TTL_S, key, keys_of

__all__ = ["make"]
ODD = b"\xff\xfe"
Replicas = Callable[..., RedisCoordinator]


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_server.url) as client:
        yield client


async def test_an_odd_name_is_struck_off_the_registry(
    redis_server: RedisServer, replicas: Replicas, redis: Redis
) -> None:
    coordinator = replicas(redis_server.url)
    await coordinator.register("a generation")
    await redis.sadd(REGISTRY, ODD)
    assert await coordinator.unowned() == ["a generation"]
    assert await redis.smembers(REGISTRY) == {b"a generation"}


async def test_a_key_of_another_kind_is_no_outage(redis_server: RedisServer, replicas: Replicas, redis: Redis) -> None:
    """Otherwise three such errors in a row would open the circuit breaker of Redis, for all generations."""
    coordinator = replicas(redis_server.url)
    for kind in ("lease", "result", "events", "token", "claim"):
        await redis.rpush(f"{PREFIX}{kind}:odd", "x")
    asked = (
        lambda: coordinator.holder("odd"),
        lambda: coordinator.result("odd"),
        lambda: coordinator.read("odd"),
        lambda: coordinator.append("odd", b"x"),
        lambda: coordinator.claim("odd", b"x", 1.0),
    )
    for ask in asked:
        with pytest.raises(MalformedValueError):
            await ask()
    assert coordinator._breaker.state is BreakerState.CLOSED
    assert await coordinator.acquire("other", "me", 1.0) is not None


@pytest.mark.parametrize("value", [b"\xff|1", b"no token", b"|x"])
async def test_a_lease_that_cannot_be_read(
    redis_server: RedisServer, replicas: Replicas, redis: Redis, value: bytes
) -> None:
    await redis.set(f"{PREFIX}lease:odd", value)
    with pytest.raises(MalformedValueError):
        await replicas(redis_server.url).holder("odd")


async def test_a_result_that_cannot_be_read(redis_server: RedisServer, replicas: Replicas, redis: Redis) -> None:
    await redis.hset(f"{PREFIX}result:odd", mapping={"pointer": "x"})
    with pytest.raises(MalformedValueError):
        await replicas(redis_server.url).result("odd")


async def test_what_is_no_stream_keeps_nobody_from_following_others(
    redis_server: RedisServer, replicas: Replicas, redis: Redis
) -> None:
    coordinator = replicas(redis_server.url)
    await coordinator.append("odd", b"1")
    heard: dict[str, list[bytes]] = {"odd": [], "other": []}

    async def follow(name: str) -> None:
        async for event in coordinator.follow(name, leader=False):
            heard[name].append(event.data)

    following = [asyncio.create_task(follow(name)) for name in heard]
    await eventually(lambda: heard["odd"] == [b"1"])
    await redis.delete(f"{PREFIX}events:odd")
    await redis.set(f"{PREFIX}events:odd", "no stream")
    with capture_logs() as logs, pytest.raises(MalformedValueError):
        await following[0]
    assert [entry["event"] for entry in logs] == ["what is no stream cannot be followed"]
    await coordinator.append("other", b"2")
    await eventually(lambda: heard["other"] == [b"2"])
    following[1].cancel()


async def test_an_entry_without_data_ends_no_stream_that_has_no_leader(
    redis_server: RedisServer, replicas: Replicas, redis: Redis
) -> None:
    coordinator, heard = replicas(redis_server.url), list[bytes]()

    async def follow() -> None:
        async for event in coordinator.follow(STREAM, leader=False):
            heard.append(event.data)

    following = asyncio.create_task(follow())
    for fields in ({"x": "y"}, {"end": "1"}, {"d": "news"}):
        await redis.xadd(f"{PREFIX}events:{STREAM}", fields)
    await eventually(lambda: heard == [b"news"])
    assert not following.done()
    following.cancel()


async def test_odd_members_of_buckets_are_passed_over(make: Make, redis: Redis) -> None:
    store = make()
    await store.add("item", ["bucket"], ANY)
    await redis.sadd(f"{BUCKETS}in:bucket", ODD)
    await redis.zadd(f"{BUCKETS}items", {ODD: 1.0})
    assert set(await kept(store, ["bucket"])) == {"item"}
    assert await store.discard(lambda item: item == "item")
    assert await kept(store, ["bucket"]) == {}


async def test_odd_keys_of_the_cache_are_passed_over(
    redis_server: RedisServer, connect: Callable[..., RedisConnection], redis: Redis
) -> None:
    store = RedisStore(connect(redis_server.url))
    await store.put(key(1), b"x", TTL_S)
    await redis.set(ENTRIES.encode() + ODD, b"x")
    assert await keys_of(store) == [key(1)]


async def odd_generations(redis: Redis) -> None:
    """Registers entries that the sweep cannot use, and entries that would crash a careless sweep."""
    await redis.sadd(REGISTRY, ODD, "no such generation", "no stream", "of another kind")
    await redis.set(f"{PREFIX}events:no stream", "x")
    await redis.rpush(f"{PREFIX}lease:of another kind", "x")
    await redis.xadd(f"{PREFIX}events:unreadable", {"d": "x"})
    await redis.sadd(REGISTRY, "unreadable")


async def test_what_is_odd_keeps_no_generation_from_being_taken_over(
    redis_server: RedisServer, tmp_path: Path, redis: Redis
) -> None:
    settings = {"lease_ttl_s": LEASE_S, "simulated_base_ms": 20}
    doomed = Replica(redis_server.url, key_file(tmp_path), tmp_path, **settings)
    async with servers(redis_server.url, tmp_path, count=1) as (one,):
        mirrors = one.running.generations.ownership.mirrors
        real, raised = mirrors._rescue, list[str]()

        async def rescue(name: str) -> None:
            if name == "no such generation":
                raised.append(name)
                raise ValueError("something that nobody has thought of")
            await real(name)

        mirrors._rescue = rescue
        with capture_logs() as logs:
            await odd_generations(redis)
            await eventually(lambda: len(raised) >= 2)
            try:
                await doomed.start()
                message = request(1, 100, cache=BYPASS, disconnect=DETACH)
                name = (await until_step(doomed.stub.Generate(message), 2))[0].generation
            finally:
                await doomed.kill()

            async def succeeded() -> bool:
                reply = await one.stub.GetGeneration(pb.GetGenerationRequest(name=name))
                return reply.generation.state == pb.Generation.STATE_SUCCEEDED

            await until(succeeded, 60.0)
        passed = "a registered generation cannot be read and is passed over"
        told = [entry.get("name") for entry in logs if entry["event"] in (passed, "bug")]
        assert sorted(str(name) for name in told) == ["no stream", "no such generation", "of another kind"], "once each"
        left = await redis.smembers(REGISTRY)
        assert ODD not in left and left >= {b"no stream", b"of another kind", b"unreadable"}


async def test_news_go_on_after_what_is_no_news(redis_server: RedisServer, tmp_path: Path, redis: Redis) -> None:
    async with servers(redis_server.url, tmp_path) as (one, other):
        for fields in ({"x": "y"}, {"d": ODD}, {"end": "1"}):
            await redis.xadd(f"{PREFIX}events:{STREAM}", fields)
            await redis.xadd(f"{PREFIX}events:purges", fields)
        call = one.stub.Generate(request(1, 500, cache=BYPASS, disconnect=DETACH))
        name = (await until_step(call, 2))[0].generation
        reply = await other.stub.CancelGeneration(pb.CancelGenerationRequest(name=name))
        assert reply.generation.state == pb.Generation.STATE_CANCELLED
