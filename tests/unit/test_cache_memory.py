"""The tier in memory."""

import pytest
from safelight_server.storage.base import TooLargeError
from safelight_server.storage.memory import ENTRY_BYTES, MemoryStore

from tests.support.stores import TTL_S, StoreRules, key, keys_of


class TestMemory(StoreRules):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore(1 << 20)


async def test_the_least_recently_used_goes_first_and_is_told() -> None:
    evicted = []
    store = MemoryStore(3 * (100 + ENTRY_BYTES), lambda key, value: evicted.append((key, len(value))))
    for number in range(3):
        await store.put(key(number), bytes(100), TTL_S)
    await store.get(key(0))
    await store.put(key(3), bytes(100), TTL_S)
    assert evicted == [(key(1), 100)]
    assert await keys_of(store) == [key(0), key(2), key(3)]


async def test_looking_at_the_beginning_is_no_use() -> None:
    store = MemoryStore(2 * (100 + ENTRY_BYTES))
    await store.put(key(0), bytes(100), TTL_S)
    await store.put(key(1), bytes(100), TTL_S)
    await store.head(key(0))
    await store.put(key(2), bytes(100), TTL_S)
    assert await keys_of(store) == [key(1), key(2)]


async def test_bytes_are_bounded_and_add_up() -> None:
    store = MemoryStore(10_000)
    for number in range(100):
        await store.put(key(number % 17), bytes(number * 40), TTL_S)
        assert (await store.usage()).num_bytes <= 10_000
    for name in await keys_of(store):
        await store.delete(name)
    assert (await store.usage()).num_bytes == 0


async def test_what_can_never_fit_is_refused_and_pushes_nothing_out() -> None:
    store = MemoryStore(1000)
    await store.put(key(0), bytes(100), TTL_S)
    with pytest.raises(TooLargeError):
        await store.put(key(1), bytes(1000), TTL_S)
    assert await keys_of(store) == [key(0)]


async def test_time_takes_an_entry_and_its_bytes() -> None:
    store = MemoryStore(1000)
    await store.put(key(0), bytes(100), 0.0)
    while await store.get(key(0)) is not None:
        await store.put(key(1), b"", TTL_S)
    await store.delete(key(1))
    assert (await store.usage()).num_bytes == 0
