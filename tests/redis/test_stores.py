"""The tiers in Redis and in object storage, on real servers."""

import asyncio
from collections.abc import Callable

import pytest
from safelight_server.storage.base import MalformedValueError, StoreFullError, StoreUnavailableError
from safelight_server.storage.objects import BucketUrl, ObjectStore, open_bucket
from safelight_server.storage.redis import RedisConnection, RedisStore

from tests.redis.conftest import BUCKET, CREDENTIALS
from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.stores import TTL_S, StoreRules, key, keys_of

Connect = Callable[..., RedisConnection]


class TestRedis(StoreRules):
    @pytest.fixture
    def store(self, redis_server: RedisServer, connect: Connect) -> RedisStore:
        return RedisStore(connect(redis_server.url))

    async def test_an_empty_value_is_a_value(self, store: RedisStore) -> None:  # type: ignore[override]
        await store.put(key(1), b"", TTL_S)
        assert await store.get(key(1)) == b""
        assert await store.head(key(1)) is None, "GETRANGE cannot tell; sealed values are never empty"


class TestObjects(StoreRules):
    @pytest.fixture
    def store(self, s3_server: str) -> ObjectStore:
        return ObjectStore(open_bucket(BucketUrl(BUCKET, "safelight/cache", s3_server), CREDENTIALS))


async def test_redis_forgets_by_time(redis_server: RedisServer, connect: Connect) -> None:
    store = RedisStore(connect(redis_server.url))
    await store.put(key(1), b"x", 0.02)
    await store.put(key(2), b"x", TTL_S)

    async def gone() -> bool:
        return await store.get(key(1)) is None

    await until(gone)
    assert await keys_of(store) == [key(2)]


async def test_a_full_redis_says_full_and_still_gives(redis_server: RedisServer, connect: Connect) -> None:
    connection = connect(redis_server.url)
    store = RedisStore(connection)
    await store.put(key(1), b"before", TTL_S)
    await connection.client.config_set("maxmemory", 1)
    with pytest.raises(StoreFullError):
        await store.put(key(2), b"x", TTL_S)
    assert await store.get(key(1)) == b"before"
    await store.delete(key(1))


async def test_a_key_of_another_type_is_no_crash(redis_server: RedisServer, connect: Connect) -> None:
    connection = connect(redis_server.url)
    await connection.client.lpush(f"safelight:cache:{key(1)}", "x")
    with pytest.raises(MalformedValueError):
        await RedisStore(connection).get(key(1))


async def test_prefixes_of_a_bucket_do_not_mix(s3_server: str) -> None:
    one, other = (ObjectStore(open_bucket(BucketUrl(BUCKET, prefix, s3_server), CREDENTIALS)) for prefix in ("a", "b"))
    await one.put(key(1), b"x", TTL_S)
    assert await other.get(key(1)) is None
    assert await keys_of(other) == []


async def test_a_bucket_that_is_not_there(s3_server: str) -> None:
    store = ObjectStore(open_bucket(BucketUrl("nowhere", "", s3_server), CREDENTIALS))
    with pytest.raises(StoreUnavailableError):
        await store.put(key(1), b"x", TTL_S)


async def test_a_call_can_be_cancelled_anywhere(redis_server: RedisServer, connect: Connect) -> None:
    """If a cancellation were lost, a timeout would not end the call."""
    for turns in range(30):
        store = RedisStore(connect(redis_server.url))

        async def call() -> None:
            await store.put(key(1), b"x", TTL_S)
            await asyncio.Event().wait()

        calling = asyncio.create_task(call())
        for _ in range(turns):
            await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(calling), 5)
