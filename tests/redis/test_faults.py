"""Tiers over a real Redis and a real S3 server that fail in every way: misses, bounded waits, one line in the log."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from moto.server import ThreadedMotoServer
from safelight_server.storage.breaker import Breaker, BreakerState
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.objects import BucketUrl, ObjectStore, open_bucket
from safelight_server.storage.redis import RedisConnection, RedisStore
from safelight_server.storage.sealed import Entry, Sealer
from safelight_server.storage.tiers import Tier, Tiers
from structlog.testing import capture_logs

from load_tests.ports import free_port
from tests.redis.conftest import BUCKET, CREDENTIALS, make_bucket
from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.relay import Relay
from tests.support.stores import TTL_S, Numbers, key

TIMEOUT_S = 0.5
FAILURES = 3


class Replica:
    """A replica's tiers: memory, and Redis behind a circuit breaker."""

    def __init__(self, connection: RedisConnection, sealer: Sealer, open_s: float) -> None:
        self.numbers = Numbers()
        self.memory = MemoryStore(1 << 24)
        self.breaker = Breaker("redis", TIMEOUT_S, FAILURES, open_s)
        self.tiers = Tiers(
            [Tier(self.memory), Tier(RedisStore(connection), self.breaker, shared=True)], sealer, self.numbers.metrics
        )

    async def data(self, number: int) -> tuple[bytes, str] | None:
        found = await self.tiers.get(key(number))
        return None if found is None else (found.entry.data, found.tier)

    async def reaches_redis(self) -> bool:
        """Whether Redis answers, tried with a key that memory does not have."""
        return await self.tiers.put(key(999), Entry(b"x"), TTL_S, replicate=True)


@pytest.fixture
async def replica(connect: Callable[..., RedisConnection]) -> AsyncIterator[Callable[..., Replica]]:
    sealer, made = Sealer(Keyring.random()), []

    def make(url: str, open_s: float = 60.0) -> Replica:
        made.append(Replica(connect(url, TIMEOUT_S), sealer, open_s))
        return made[-1]

    yield make
    for one in made:
        await one.tiers.close()


async def test_two_replicas_see_each_others_entries(redis_server: RedisServer, replica: Callable[..., Replica]) -> None:
    one, other = replica(redis_server.url), replica(redis_server.url)
    assert await one.tiers.put(key(1), Entry(b"x"), TTL_S, replicate=True)
    assert await other.data(1) == (b"x", "redis")
    await other.tiers.flush()
    assert await other.data(1) == (b"x", "memory")


async def test_absent_at_start_and_found_when_it_comes(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    redis_server.kill()
    one = replica(redis_server.url, open_s=0.05)
    with capture_logs() as lines:
        for number in range(50):
            assert await one.data(number) is None
        await one.tiers.put(key(1), Entry(b"x"), TTL_S)
        assert await one.data(1) == (b"x", "memory")
        await one.tiers.flush()
        await asyncio.to_thread(redis_server.start)
        await until(one.reaches_redis)
    assert [line["log_level"] for line in lines] == ["warning", "info"]


async def test_killed(redis_server: RedisServer, replica: Callable[..., Replica]) -> None:
    one = replica(redis_server.url)
    await one.tiers.put(key(1), Entry(b"x"), TTL_S, replicate=True)
    redis_server.kill()
    with capture_logs() as lines:
        assert await asyncio.gather(*(one.data(number) for number in range(100, 200))) == [None] * 100
        assert await one.data(1) == (b"x", "memory")
        assert not await one.tiers.put(key(2), Entry(b"y"), TTL_S, replicate=True)
    assert one.breaker.state is BreakerState.OPEN
    assert len(lines) == 1
    assert one.numbers.errors("redis", "left_alone") > 0


async def test_hung_costs_few_waits(redis_server: RedisServer, replica: Callable[..., Replica]) -> None:
    one = replica(redis_server.url)
    await one.tiers.put(key(1), Entry(b"x"), TTL_S, replicate=True)
    redis_server.freeze()
    with capture_logs() as lines:
        for number in range(100, 200):
            assert await one.data(number) is None
    redis_server.thaw()
    assert one.numbers.errors("redis", "unavailable") == FAILURES, "the others did not wait"
    assert one.numbers.errors("redis", "left_alone") == 100 - FAILURES
    assert len(lines) == 1


async def test_hung_and_back(redis_server: RedisServer, replica: Callable[..., Replica]) -> None:
    one = replica(redis_server.url, open_s=0.05)
    for number in range(20):
        await one.tiers.put(key(number), Entry(bytes([number])), TTL_S, replicate=True)
        await one.memory.delete(key(number))
    redis_server.freeze()
    await asyncio.gather(*(one.data(number) for number in range(20)))
    redis_server.thaw()
    await until(one.reaches_redis)
    assert [await one.data(number) for number in range(20)] == [(bytes([number]), "redis") for number in range(20)]


async def test_restarted_under_load(redis_server: RedisServer, replica: Callable[..., Replica]) -> None:
    one = replica(redis_server.url, open_s=0.05)
    stop = asyncio.Event()

    async def load(worker: int) -> int:
        turns = 0
        while not stop.is_set():
            number = 1000 * worker + turns % 50
            await one.tiers.put(key(number), Entry(f"{number}".encode()), TTL_S)
            await one.memory.delete(key(number))
            found = await one.data(number)
            assert found is None or found[0] == f"{number}".encode()
            turns += 1
            await asyncio.sleep(0)
        return turns

    with capture_logs() as lines:
        loads = [asyncio.create_task(load(worker)) for worker in range(8)]
        for _ in range(2):
            await asyncio.to_thread(redis_server.kill)
            await until(lambda: asyncio.sleep(0, one.breaker.state is not BreakerState.CLOSED))
            await asyncio.to_thread(redis_server.start)
            await until(one.reaches_redis)
        stop.set()
        assert all(await asyncio.gather(*loads))
    assert [line["log_level"] for line in lines] == ["warning", "info"] * 2


async def test_full(
    redis_server: RedisServer, replica: Callable[..., Replica], connect: Callable[..., RedisConnection]
) -> None:
    one = replica(redis_server.url)
    await one.tiers.put(key(1), Entry(b"x"), TTL_S, replicate=True)
    await one.memory.delete(key(1))
    admin = connect(redis_server.url).client
    await admin.config_set("maxmemory", 1)
    with capture_logs() as lines:
        for number in range(2, 20):
            assert not await one.tiers.put(key(number), Entry(b"y"), TTL_S, replicate=True)
            assert await one.data(number) == (b"y", "memory")
        assert await one.data(1) == (b"x", "redis"), "what is there is still served"
        await admin.config_set("maxmemory", 0)
        assert await one.reaches_redis()
        await one.tiers.flush()
    assert one.breaker.state is BreakerState.CLOSED
    assert one.numbers.errors("redis", "full") >= 18
    assert [line["log_level"] for line in lines] == ["warning", "info"]


async def test_slow(redis_server: RedisServer, replica: Callable[..., Replica]) -> None:
    relay = await Relay.start(redis_server.address)
    one = replica(f"redis://{relay.address}/0", open_s=0.05)
    assert await one.reaches_redis()
    relay.delay_s = TIMEOUT_S * 5
    with capture_logs() as lines:
        for number in range(20):
            assert await one.data(number) is None
        relay.delay_s = 0.0
        await until(one.reaches_redis)
    assert [line["log_level"] for line in lines] == ["warning", "info"]
    relay.cut()
    assert await one.data(1) is None


async def test_corrupt_in_redis(
    redis_server: RedisServer, replica: Callable[..., Replica], connect: Callable[..., RedisConnection]
) -> None:
    one = replica(redis_server.url)
    await one.tiers.put(key(1), Entry(b"x"), TTL_S, replicate=True)
    await one.memory.delete(key(1))
    await connect(redis_server.url).client.setrange(f"safelight:cache:{key(1)}", 50, b"!!")
    assert await one.data(1) is None
    assert one.numbers.gets("redis", "corrupt") == 1
    assert await connect(redis_server.url).client.exists(f"safelight:cache:{key(1)}") == 0


async def test_s3_down_and_back() -> None:
    port = free_port()  # one that is still free when the server comes back
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    make_bucket(endpoint)
    numbers = Numbers()
    memory = MemoryStore(1 << 20)
    store = ObjectStore(open_bucket(BucketUrl(BUCKET, "x", endpoint), CREDENTIALS))
    breaker = Breaker("objects", 5.0, FAILURES, 0.05)
    tiers = Tiers(
        [Tier(memory), Tier(store, breaker, eager=False, shared=True)], Sealer(Keyring.random()), numbers.metrics
    )
    assert await tiers.put(key(1), Entry(b"x"), TTL_S, replicate=True)
    await memory.delete(key(1))
    server.stop()
    with capture_logs() as lines:
        for number in range(50):
            assert await tiers.get(key(number)) is None
        assert not await tiers.put(key(2), Entry(b"x"), TTL_S, replicate=True)
        again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        again.start()
        make_bucket(endpoint)

        async def back() -> bool:
            return await tiers.put(key(3), Entry(b"x"), TTL_S, replicate=True)

        await until(back)
    assert [line["log_level"] for line in lines] == ["warning", "info"]
    again.stop()
    await tiers.close()
