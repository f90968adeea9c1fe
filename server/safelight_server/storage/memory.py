"""The memory tier: a store in this process, bounded by bytes, that evicts the least recently used entries.

aiocache holds the values and expires them. It bounds neither their number nor their size, so this module counts bytes
and keeps the order of use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator

from aiocache import SimpleMemoryCache

from safelight_server.storage.base import HEADER_BYTES, OnEvict, StoreUsage, TooLargeError, check_key

ENTRY_BYTES = 512
"""Bytes that an entry takes beside its value: its key, two dict entries and its timer."""


class MemoryStore:
    """A `Store` in this process.

    Args:
        max_bytes: of all values, with `ENTRY_BYTES` added to each.
        on_evict: called with each evicted entry.
    """

    name = "memory"

    def __init__(self, max_bytes: int, on_evict: OnEvict | None = None) -> None:
        self.on_evict = on_evict
        self._max_bytes = max_bytes
        self._values = SimpleMemoryCache(timeout=None)
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0

    async def get(self, key: str) -> bytes | None:
        """Returns the value, or None, and marks the key as the most recently used."""
        value = await self._peek(key)
        if value is not None:
            self._sizes.move_to_end(key)
        return value

    async def head(self, key: str) -> bytes | None:
        """Returns the first `HEADER_BYTES` of the value, or None."""
        value = await self._peek(key)
        return None if value is None else value[:HEADER_BYTES]

    async def _peek(self, key: str) -> bytes | None:
        if key not in self._sizes:
            return None
        value: bytes | None = await self._values.get(key)
        if value is None:
            self._bytes -= self._sizes.pop(key)
        return value

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Stores the value and evicts entries until all fit."""
        check_key(key)
        size = len(value) + ENTRY_BYTES
        if size > self._max_bytes:
            raise TooLargeError(f"{len(value)} bytes are more than memory holds")
        self._bytes += size - self._sizes.pop(key, 0)
        self._sizes[key] = size
        await self._values.set(key, value, ttl=max(ttl_s, 0.001))
        while self._bytes > self._max_bytes:
            oldest = next(iter(self._sizes))
            evicted = await self._peek(oldest)
            await self.delete(oldest)
            if evicted is not None and self.on_evict is not None:
                self.on_evict(oldest, evicted)

    async def delete(self, key: str) -> None:
        """Deletes a key."""
        await self._values.delete(key)
        self._bytes -= self._sizes.pop(key, 0)

    async def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """Lists the keys that begin with `prefix`."""
        for key in list(self._sizes):
            if key.startswith(prefix) and await self._peek(key) is not None:
                yield key

    async def usage(self) -> StoreUsage:
        """Returns number and size of the entries. Expired entries count until they are read or evicted."""
        return StoreUsage(len(self._sizes), self._bytes)

    async def close(self) -> None:
        """Deletes all entries."""
        await self._values.clear()
        self._sizes.clear()
        self._bytes = 0
