"""A slow Redis during generations: they continue, its breaker opens, and late writes count only once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.storage.base import StoreError
from safelight_server.storage.breaker import BreakerState
from structlog.testing import capture_logs

from tests.conftest import eventually
from tests.redis.test_ownership import Server, servers
from tests.redis.test_replicas import BYPASS, DETACH, request
from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.relay import Relay
from tests.support.replicas import bills, collect, picture, sequences, until_step

STEPS = 60
TIMEOUT_S = 1.0


@pytest.fixture
async def relay(redis_server: RedisServer) -> AsyncIterator[Relay]:
    """A relay between Redis and all replicas."""
    made = await Relay.start(redis_server.address)
    yield made
    made.cut()


@contextmanager
def slow(relay: Relay, delay_s: float) -> Iterator[None]:
    """Delays Redis during the block, also if the test fails, so that its servers can end."""
    relay.delay_s = delay_s
    try:
        yield
    finally:
        relay.delay_s = 0.0


def breaker_of(server: Server):  # type: ignore[no-untyped-def]
    return server.coordinator._breaker


async def undisturbed(server: Server, seeds: range) -> list[bytes]:
    calls = [collect(server.stub.Generate(request(seed, STEPS, cache=BYPASS))) for seed in seeds]
    return [picture(events) for events in await asyncio.gather(*calls)]


async def test_generations_go_on_and_redis_is_left_alone(relay: Relay, tmp_path: Path) -> None:
    """After the first calls without an answer Redis is not called any more, so that no event waits for it."""
    settings = {"redis_timeout_ms": int(TIMEOUT_S * 1000), "breaker_open_s": 600}
    async with servers(f"redis://{relay.address}/0", tmp_path, **settings) as both:
        expected = await undisturbed(both[0], range(4))
        calls = [both[n % 2].stub.Generate(request(n, STEPS)) for n in range(4)]
        calls += [both[1 - n % 2].stub.Generate(request(n, STEPS)) for n in range(2)]
        begun = await asyncio.gather(*(until_step(call, 4) for call in calls))
        assert all(events[0].accepted.durability == pb.Accepted.DURABILITY_REPLICATED for events in begun)
        with capture_logs() as lines, slow(relay, TIMEOUT_S * 5):
            await eventually(lambda: all(breaker_of(server).state is BreakerState.OPEN for server in both))
            await eventually(lambda: relay.num_under_way == 0)
            asked = relay.num_passed
            streams = await asyncio.gather(*(collect(call) for call in calls))
            fresh = await collect(both[0].stub.Generate(request(20, STEPS)))
        assert relay.num_passed == asked
        for number, events in enumerate(streams):
            assert picture(events) == expected[number % 4]
            assert sequences(begun[number] + events) == [1, 2, 3]
        assert fresh[0].accepted.durability == pb.Accepted.DURABILITY_LOCAL
        assert fresh[-1].finished.status.code == 0
        said = [line["event"] for line in lines if line["log_level"] == "warning" and "service" in line]
        assert len(said) == 2, "one line a replica"
        for server in both:
            breaker_of(server)._open_s = 0.0  # so that it is tried again, and closing does not wait
        await eventually(lambda: all(breaker_of(server).state is BreakerState.CLOSED for server in both))


async def test_what_is_slow_and_answers_in_time_costs_nothing_else(relay: Relay, tmp_path: Path) -> None:
    async with servers(f"redis://{relay.address}/0", tmp_path, redis_timeout_ms=5000) as (one, other):
        expected = await undisturbed(one, range(3))
        relay.delay_s = 0.05
        with capture_logs() as lines:
            streams = await asyncio.gather(
                *(collect(server.stub.Generate(request(n, STEPS))) for n in range(3) for server in (one, other))
            )
        assert [picture(events) for events in streams] == [data for data in expected for _ in range(2)]
        assert all(sequences(events) == [1, 2, 3] for events in streams)
        assert all(events[0].accepted.durability == pb.Accepted.DURABILITY_REPLICATED for events in streams)
        assert sum(events[-1].finished.usage.num_steps for events in streams) == 3 * STEPS
        assert [line for line in lines if line["log_level"] == "warning"] == []


async def test_a_redis_that_hangs_longer_than_a_lease_and_comes_back(redis_server: RedisServer, tmp_path: Path) -> None:
    """Meanwhile leaders and their former followers compute the same; only one of them is billed."""
    steps = 200
    async with servers(redis_server.url, tmp_path, redis_timeout_ms=int(TIMEOUT_S * 1000)) as both:
        calls = [server.stub.Generate(request(n, steps)) for n in range(3) for server in both]
        begun = await asyncio.gather(*(until_step(call, 4) for call in calls))
        redis_server.freeze()
        await eventually(
            lambda: all(server.running.generations._planner._leased_runners.away.is_set() for server in both)
        )
        redis_server.thaw()
        streams = await asyncio.gather(*(collect(call) for call in calls))
        expected = [request(n, steps, cache=BYPASS) for n in range(3)]
        calm = await asyncio.gather(*(collect(both[0].stub.Generate(message)) for message in expected))
        names = [[before[0].generation for before in begun[2 * n : 2 * n + 2]] for n in range(3)]
        for number, (before, events) in enumerate(zip(begun, streams, strict=True)):
            assert picture(events) == picture(calm[number // 2])
            assert sequences(before + events) == [1, 2, 3]
        assert sum(events[-1].finished.usage.num_steps for events in streams) > 3 * steps, "some was done twice"

        async def billed() -> list[int]:
            found = [bill["generation"] for bill in await bills(redis_server.url, tmp_path)]
            return [sum(found.count(name) for name in pair) for pair in names]

        async def settled() -> bool:
            return min(await billed()) > 0 and all(
                not s.running.generations._planner._leased_runners._tasks for s in both
            )

        await until(settled)
        assert await billed() == [1, 1, 1]


async def test_what_was_written_too_late_is_neither_billed_nor_told_twice(relay: Relay, tmp_path: Path) -> None:
    """Writes arrive after their time limit, while they are tried again."""
    settings = {"redis_timeout_ms": int(TIMEOUT_S * 1000), "breaker_open_s": 0.1}
    async with servers(f"redis://{relay.address}/0", tmp_path, **settings) as (one, other):
        expected = await undisturbed(one, range(3))
        calls = [one.stub.Generate(request(n, STEPS, disconnect=DETACH)) for n in range(3)]
        begun = await asyncio.gather(*(until_step(call, 40) for call in calls))
        relay.delay_s = TIMEOUT_S * 2
        streams = await asyncio.gather(*(collect(call) for call in calls))
        assert [picture(events) for events in streams] == expected
        assert all(sequences(before + events) == [1, 2, 3] for before, events in zip(begun, streams, strict=True))
        relay.delay_s = 0.0
        names = [events[0].generation for events in begun]

        async def billed() -> list[str]:
            found = [str(bill["generation"]) for bill in await bills(f"redis://{relay.address}/0", tmp_path)]
            return sorted(name for name in found if name in names)

        async def settled() -> bool:
            try:
                return len(await billed()) >= len(names) and await other.coordinator.unowned() == []
            except StoreError:  # the breaker was open just now
                return False

        await until(settled)
        assert await billed() == sorted(names)
        for name, data in zip(names, expected, strict=True):
            again = await collect(other.stub.WatchGeneration(pb.WatchGenerationRequest(name=name)))
            assert (sequences(again), picture(again)) == ([1, 2, 3], data)
