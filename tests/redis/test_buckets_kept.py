"""LSH buckets in a real Redis over a long time: expired items are removed, and purges succeed or report failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from safelight_server.cache.approximate.buckets import ITEMS, PREFIX
from safelight_server.storage.redis import RedisConnection

from tests.redis.test_buckets import ANY, OTHER, Make, kept, make
from tests.support.coordination import until
from tests.support.redis_server import RedisServer

__all__ = ["make"]


async def test_what_has_expired_makes_room(
    make: Make, redis_server: RedisServer, connect: Callable[..., RedisConnection]
) -> None:
    brief = make(ttl_s=0.05)
    for number in range(10):
        await brief.add(f"old{number}", ["x", f"own{number}"], ANY)
    client = connect(redis_server.url).client
    await client.persist(f"{PREFIX}in:x")  # as if something had been added to the bucket all the time
    await client.persist(ITEMS)

    async def expired() -> bool:
        return not await kept(brief, [f"own{number}" for number in range(10)])

    await until(expired)
    await make(ttl_s=0.05).add("new", ["x"], OTHER)
    assert await client.smembers(f"{PREFIX}in:x") == {b"new"}, "what cannot be served is no candidate"
    assert await client.zcard(ITEMS) == 1


async def test_a_purge_of_many_is_made_of_short_calls(
    make: Make, redis_server: RedisServer, connect: Callable[..., RedisConnection]
) -> None:
    store = make(max_items=10_000)
    await asyncio.gather(*(store.add(f"{'a' if n % 10 else 'b'} {n}", ["x"], ANY) for n in range(3000)))
    assert await make().discard(lambda item: item.startswith("b"))
    left = await connect(redis_server.url).client.zrange(ITEMS, 0, -1)
    assert len(left) == 2700
    assert all(item.startswith(b"a") for item in left)


async def test_a_purge_that_redis_does_not_take_says_so(make: Make, redis_server: RedisServer) -> None:
    store = make()
    await store.add("a", ["x"], ANY)
    assert await store.discard(lambda _item: True)
    redis_server.kill()
    assert not await store.discard(lambda _item: True)
