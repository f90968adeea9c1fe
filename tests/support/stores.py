"""Tests that every store of a cache tier must pass, and a fake store that fails on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry
from safelight_server.storage.base import (
    HEADER_BYTES,
    OnEvict,
    Store,
    StoreFullError,
    StoreUnavailableError,
    StoreUsage,
)
from safelight_server.telemetry.metrics import TierMetrics

TTL_S = 60.0


def key(number: int, tenant: str = "ab01", kind: str = "exact") -> str:
    """A valid cache key."""
    return f"{tenant}/{kind}/{number:064x}"


async def keys_of(store: Store, prefix: str = "") -> list[str]:
    """All keys of a store, sorted."""
    return sorted([name async for name in store.keys(prefix)])


class StoreRules:
    """The tests; a subclass provides the fixture `store`."""

    async def test_what_was_put_is_there_until_it_is_deleted(self, store: Store) -> None:
        assert await store.get(key(1)) is None
        value = bytes(range(256)) * 40
        await store.put(key(1), value, TTL_S)
        assert await store.get(key(1)) == value
        await store.put(key(1), b"newer", TTL_S)
        assert await store.get(key(1)) == b"newer"
        await store.delete(key(1))
        assert await store.get(key(1)) is None
        await store.delete(key(1))

    async def test_the_beginning_of_a_value(self, store: Store) -> None:
        await store.put(key(1), bytes(range(200)), TTL_S)
        assert await store.head(key(1)) == bytes(range(HEADER_BYTES))
        assert await store.head(key(2)) is None

    async def test_keys_by_tenant(self, store: Store) -> None:
        for number in range(30):
            await store.put(key(number, "ab01" if number % 2 else "cd02"), b"x", TTL_S)
        assert await keys_of(store, "ab01/") == sorted(key(number, "ab01") for number in range(1, 30, 2))
        assert len(await keys_of(store)) == 30
        assert (await store.usage()).entries == 30

    async def test_a_key_that_is_a_path_out_is_refused(self, store: Store) -> None:
        for name in ("../../x", "ab01/exact", "ab01/exact/" + "A" * 64, "a//b", "a/b/c\n"):
            with pytest.raises(ValueError):
                await store.put(name, b"x", TTL_S)

    async def test_an_empty_value_is_a_value(self, store: Store) -> None:
        await store.put(key(1), b"", TTL_S)
        assert await store.get(key(1)) == b""


class FaultyStore:
    """A store in a dict that fails on demand.

    Attributes:
        fault: the present fault: "", "unavailable", "full" (for puts) or "hangs".
    """

    def __init__(self, name: str = "disk", max_bytes: int = 1 << 30) -> None:
        self.name = name
        self.values: dict[str, bytes] = {}
        self.fault = ""
        self.calls = 0
        self.on_evict: OnEvict | None = None
        self._max_bytes = max_bytes

    async def _fail(self, putting: bool = False) -> None:
        self.calls += 1
        await asyncio.sleep(0)
        if self.fault == "unavailable":
            raise StoreUnavailableError(self.name)
        if self.fault == "full" and putting:
            raise StoreFullError(self.name)
        if self.fault == "hangs":
            await asyncio.Event().wait()

    async def get(self, key: str) -> bytes | None:
        await self._fail()
        return self.values.get(key)

    async def head(self, key: str) -> bytes | None:
        await self._fail()
        value = self.values.get(key)
        return None if value is None else value[:HEADER_BYTES]

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        await self._fail(putting=True)
        self.values.pop(key, None)
        self.values[key] = value
        while sum(map(len, self.values.values())) > self._max_bytes:
            oldest = next(iter(self.values))
            evicted = self.values.pop(oldest)
            if self.on_evict is not None:
                self.on_evict(oldest, evicted)

    async def delete(self, key: str) -> None:
        await self._fail()
        self.values.pop(key, None)

    async def keys(self, prefix: str = "") -> AsyncIterator[str]:
        await self._fail()
        for name in list(self.values):
            if name.startswith(prefix):
                yield name

    async def usage(self) -> StoreUsage:
        await self._fail()
        return StoreUsage(len(self.values), sum(map(len, self.values.values())))

    async def close(self) -> None:
        pass


class Numbers:
    """`TierMetrics` in a registry of its own, with its counters read back."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = TierMetrics(self.registry)

    def gets(self, tier: str, outcome: str) -> float:
        """Number of lookups in a tier with this outcome."""
        return self.registry.get_sample_value("safelight_cache_gets_total", {"tier": tier, "outcome": outcome}) or 0

    def errors(self, tier: str, reason: str) -> float:
        """Number of calls of a tier that failed or were skipped for this reason."""
        return self.registry.get_sample_value("safelight_cache_errors_total", {"tier": tier, "reason": reason}) or 0

    def dropped(self, tier: str) -> float:
        """Number of values that were not written to a tier in the background."""
        return self.registry.get_sample_value("safelight_cache_moves_dropped_total", {"tier": tier}) or 0
