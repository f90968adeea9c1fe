"""Two servers of this process on one Redis, whose machines' clocks differ by minutes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis
from safelight.v1 import generation_pb2 as pb
from safelight_server.storage.clock import SharedClock
from safelight_server.storage.redis import RedisConnection
from structlog.testing import capture_logs

from tests.conftest import eventually, serving_here
from tests.redis.test_ownership import Server, server_settings
from tests.redis.test_replicas import BYPASS, DETACH, request
from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.replicas import collect, until_step

SKEW_S = 400.0
"""Seconds; longer than messages are kept, and than a generation without a result can be queried."""
STEPS = 30


@contextlib.asynccontextmanager
async def server(redis_server: RedisServer, folder: Path, skew_s: float, **settings: object) -> AsyncIterator[Server]:
    """A server whose machine's clock is ahead."""
    given = server_settings(redis_server.url, folder) | {"result_ttl_s": 300} | settings
    async with (
        serving_here(wall=lambda: time.time() + skew_s, **given) as running,
        grpc.aio.insecure_channel(running.address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        yield Server(running, channel)


@pytest.fixture(params=[SKEW_S, -SKEW_S])
async def pair(request, redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[tuple[Server, Server]]:  # type: ignore[no-untyped-def]
    async with server(redis_server, tmp_path, 0.0) as right, server(redis_server, tmp_path, request.param) as wrong:
        yield right, wrong


async def ended(server: Server, name: str) -> pb.Generation.State:
    return (await server.stub.GetGeneration(pb.GetGenerationRequest(name=name))).generation.state


async def test_what_has_ended_is_found(pair: tuple[Server, Server]) -> None:
    for one, other in (pair, pair[::-1]):
        name = (await collect(one.stub.Generate(request(1, 2, cache=BYPASS))))[0].generation

        async def there(other: Server = other, name: str = name) -> bool:
            return await ended(other, name) == pb.Generation.STATE_SUCCEEDED

        await until(there)
        events = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name)))
        assert events[-1].WhichOneof("event") == "finished"


async def test_what_is_cancelled_elsewhere_ends(pair: tuple[Server, Server]) -> None:
    for one, other in (pair, pair[::-1]):
        call = one.stub.Generate(request(2, 500, cache=BYPASS, disconnect=DETACH))
        name = (await until_step(call, 2))[0].generation
        reply = await other.stub.CancelGeneration(pb.CancelGenerationRequest(name=name))
        assert reply.generation.state == pb.Generation.STATE_CANCELLED
        call.cancel()


async def test_a_deadline_stays_where_it_was(pair: tuple[Server, Server]) -> None:
    """By the clock of the machine that takes over, the deadline of 100 s would have passed, or be far away."""
    for one, other in (pair, pair[::-1]):
        call = one.stub.Generate(request(3, 500, cache=BYPASS), timeout=100.0)
        name = (await until_step(call, 2))[0].generation
        call.cancel()
        watch = other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name))
        live, identifier = other.running.generations._live, name.partition("/")[2]
        await asyncio.gather(watch.wait_for_connection(), eventually(lambda: identifier in live))
        generation = live[identifier]
        assert generation.left_s is not None and 50.0 < generation.left_s < 150.0
        await other.stub.CancelGeneration(pb.CancelGenerationRequest(name=name))


async def test_a_replica_tells_how_wrong_its_clock_is(redis_server: RedisServer, tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with server(redis_server, tmp_path, SKEW_S, log_level="warning") as wrong:
            await collect(wrong.stub.Generate(request(1, 2)))
    (entry,) = [entry for entry in logs if "clock" in str(entry["event"])]
    assert entry["offset_s"] == pytest.approx(SKEW_S, abs=5.0)


async def test_the_clock_is_set_before_anything_is_written(
    redis_server: RedisServer, connect: Callable[..., RedisConnection]
) -> None:
    clock = SharedClock(lambda: time.time() + SKEW_S)
    await connect(redis_server.url, 5.0, clock).client.get("x")
    assert clock.now() == pytest.approx(time.time(), abs=5.0)


async def test_a_redis_that_keeps_its_time_to_itself_is_used_all_the_same(
    redis_server: RedisServer, connect: Callable[..., RedisConnection]
) -> None:
    async with Redis.from_url(redis_server.url) as admin:
        await admin.execute_command("ACL", "SETUSER", "default", "-time")
    connection = connect(redis_server.url)
    with capture_logs() as logs:
        await connection.client.set("x", b"1")
        await connection.check()
    assert ["refuses TIME" in str(entry["event"]) for entry in logs] == [True]
