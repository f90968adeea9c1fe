"""LSH buckets in a real Redis: a replica finds what another one has added."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from safelight_server.cache.approximate.buckets import PREFIX, RedisBuckets
from safelight_server.cache.approximate.lsh import Signatures, SimilarIndex
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.redis import RedisConnection
from safelight_server.storage.sealed import Sealer

from tests.support.redis_server import RedisServer

DIMENSION = 64
Make = Callable[..., RedisBuckets]


@pytest.fixture
def make(redis_server: RedisServer, connect: Callable[..., RedisConnection]) -> Make:
    sealer = Sealer(Keyring.random())

    def one(**options: int) -> RedisBuckets:
        breaker = Breaker("redis", 5.0)
        given = {"ttl_s": 60.0, "max_items": 1000} | options
        return RedisBuckets(connect(redis_server.url), breaker, sealer, **given)  # type: ignore[arg-type]

    return one


def vector(seed: int, near: np.ndarray | None = None) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)
    if near is not None:
        found = near + 0.1 * found / np.linalg.norm(found)
    return (found / np.linalg.norm(found)).astype(np.float32)


ANY, OTHER = np.ones(DIMENSION, np.float16), np.zeros(DIMENSION, np.float16)


async def kept(store: RedisBuckets, buckets: list[str]) -> dict[str, bytes]:
    """The items in the buckets, and their vectors."""
    items, vectors = await store.find(buckets, 100, DIMENSION)
    return {item: vector.tobytes() for item, vector in zip(items, vectors, strict=True)}


async def test_what_one_replica_adds_another_finds(make: Make) -> None:
    one, other = (SimilarIndex(Signatures(DIMENSION, 1), make()) for _ in range(2))
    for number in range(50):
        await one.add("scope", f"item{number}", vector(number))
    for number in range(50):
        [found] = await other.search("scope", vector(1000 + number, vector(number)), 0.9)
        assert found.item == f"item{number}"
        assert found.cosine >= 0.9
    assert await other.search("elsewhere", vector(3), 0.5) == []
    await other.remove("item3")
    assert await one.search("scope", vector(3), 0.9) == []


async def test_vectors_lie_sealed(
    make: Make, redis_server: RedisServer, connect: Callable[..., RedisConnection]
) -> None:
    store = make()
    half = vector(1).astype(np.float16)
    packed = half.tobytes()
    await store.add("a", ["x"], half)
    assert await kept(store, ["x"]) == {"a": packed}
    raw = await connect(redis_server.url).client.get(f"{PREFIX}vector:a")
    assert raw is not None and packed[:16] not in raw
    await connect(redis_server.url).client.set(f"{PREFIX}vector:b", raw)
    await connect(redis_server.url).client.sadd(f"{PREFIX}in:x", "b")
    assert await kept(store, ["x"]) == {"a": packed}, "a vector counts under its own name only"


async def test_everything_is_bounded_and_ends(
    make: Make, redis_server: RedisServer, connect: Callable[..., RedisConnection]
) -> None:
    store = make(max_items=10, max_members=4)
    for number in range(20):
        await store.add(f"{number:02}", ["one", f"own{number}"], ANY)
    assert len(await kept(store, ["one"])) == 4
    there = await kept(store, [f"own{number}" for number in range(20)])
    assert list(there) == [f"{number:02}" for number in range(10, 20)]
    client = connect(redis_server.url).client
    async for name in client.scan_iter(f"{PREFIX}*"):
        assert await client.pttl(name) > 0, name


async def test_an_item_that_is_added_again_leaves_its_old_buckets(make: Make) -> None:
    store = make()
    await store.add("a", ["x", "y"], ANY)
    await store.add("a", ["y", "z"], OTHER)
    assert await kept(store, ["x"]) == {}
    assert await kept(store, ["x", "y", "z"]) == {"a": OTHER.tobytes()}


async def test_a_purge_takes_out_what_it_covers(make: Make) -> None:
    store = make()
    for item in ("a 1", "a 2", "b 1"):
        await store.add(item, ["x"], ANY)
    await make().discard(lambda item: item.startswith("a"))
    assert list(await kept(store, ["x"])) == ["b 1"]


async def test_without_redis_nothing_is_found_and_nothing_fails(make: Make, redis_server: RedisServer) -> None:
    store = make()
    redis_server.kill()
    await store.add("a", ["x"], ANY)
    await store.remove("a")
    await store.discard(lambda _item: True)
    assert await kept(store, ["x"]) == {}
