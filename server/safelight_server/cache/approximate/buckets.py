"""LSH buckets in Redis, so that replicas find each other's pictures: an implementation of `lsh.BucketStore`.

Each bucket is a Redis set and each vector an encrypted value; one sorted set by time bounds the number of items. `add`
is one script; `find` is one SUNION and one MGET. If Redis fails, nothing is found. Item and bucket names are HMACs.
Vectors are encrypted because they reveal something of the prompts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np

from safelight_server.cache.approximate.lsh import Halves
from safelight_server.storage.base import StoreError
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.redis import RedisConnection, translated
from safelight_server.storage.sealed import CorruptError, Entry, Sealer, UnreadableError

T = TypeVar("T")
PREFIX = "safelight:lsh:"
ITEMS = f"{PREFIX}items"
LOOKED_AT = 1000
"""Items per Redis call of `discard`."""


class RedisBuckets:
    """A `BucketStore` in Redis.

    Args:
        ttl_s: seconds until an item expires.
        max_items: most items; the item that was added longest ago is removed first.
        max_members: most items of a bucket; a full bucket drops a random one, which stays in its other buckets.
    """

    def __init__(
        self,
        connection: RedisConnection,
        breaker: Breaker,
        sealer: Sealer,
        *,
        ttl_s: float,
        max_items: int,
        max_members: int = 64,
    ) -> None:
        self._redis: Any = connection.client  # its stubs leave open whether answers are decoded: they are not
        self._breaker = breaker
        self._sealer = sealer
        self._ttl_s = ttl_s
        self._max_items = max_items
        self._max_members = max_members
        self._add = self._redis.register_script(files(__package__).joinpath("buckets_add.lua").read_text())

    async def add(self, item: str, buckets: Sequence[str], vector: Halves) -> None:
        """Puts an item with its vector (D,) into its buckets. Nothing happens if Redis fails."""
        now = self._sealer.now()
        sealed = self._sealer.seal(item, Entry(vector.tobytes()), now + self._ttl_s)
        keys = [ITEMS, f"{PREFIX}vector:{item}", f"{PREFIX}of:{item}", *(f"{PREFIX}in:{bucket}" for bucket in buckets)]
        arguments: list[str | bytes | float] = [
            item,
            sealed,
            now,
            int(self._ttl_s * 1000),
            self._max_items,
            self._max_members,
            PREFIX,
            now - self._ttl_s,
        ]
        await self._call(lambda: self._add(keys=keys, args=arguments), None)

    async def remove(self, item: str) -> None:
        """Removes an item and its vector. Nothing happens if Redis fails."""
        await self._call(lambda: self._removed(item), None)

    async def _removed(self, item: str) -> None:
        buckets = await self._redis.smembers(f"{PREFIX}of:{item}")
        async with self._redis.pipeline(transaction=True) as pipe:
            for bucket in buckets:
                pipe.srem(bucket, item)
            pipe.delete(f"{PREFIX}of:{item}", f"{PREFIX}vector:{item}")
            pipe.zrem(ITEMS, item)
            await pipe.execute()

    async def discard(self, goes: Callable[[str], bool]) -> bool:
        """Removes all items for which `goes` returns true, in batches so that each Redis call is short.

        False if Redis fails.
        """
        cursor = 0
        try:
            while True:
                cursor, found = await self._ask(lambda at=cursor: self._redis.zscan(ITEMS, at, count=LOOKED_AT))  # type: ignore[misc]
                for item in _names(item for item, _ in found):
                    if goes(item):
                        await self._ask(lambda item=item: self._removed(item))  # type: ignore[misc]
                if not cursor:
                    return True
        except StoreError:
            return False

    async def find(self, buckets: Sequence[str], limit: int, dimension: int) -> tuple[Sequence[str], Halves]:
        """Returns at most `limit` items of the buckets, in no useful order, and their vectors (N, `dimension`)."""
        keys = [f"{PREFIX}in:{bucket}" for bucket in buckets]
        found: set[bytes] = await self._call(lambda: self._redis.sunion(keys), set())
        items = sorted(_names(found))[:limit]
        opened = await self._vectors(items) if items else {}
        packed = b"".join(opened.values())
        return list(opened), np.frombuffer(packed, np.float16).reshape(-1, dimension)

    async def _vectors(self, items: Sequence[str]) -> dict[str, bytes]:
        """Returns the vectors of the items that still exist, as bytes."""
        keys = [f"{PREFIX}vector:{item}" for item in items]
        values: list[bytes | None] = await self._call(lambda: self._redis.mget(keys), [None] * len(keys))
        opened = {
            item: self._opened(item, value) for item, value in zip(items, values, strict=True) if value is not None
        }
        return {item: data for item, data in opened.items() if data is not None}

    def _opened(self, item: str, value: bytes) -> bytes | None:
        try:
            entry, expires_at = self._sealer.open(item, value)
        except (CorruptError, UnreadableError):
            return None
        return entry.data if expires_at > self._sealer.now() else None

    async def _call(self, work: Callable[[], Awaitable[T]], otherwise: T) -> T:
        try:
            return await self._ask(work)
        except StoreError:
            return otherwise

    async def _ask(self, work: Callable[[], Awaitable[T]]) -> T:
        async def translating() -> T:
            with translated():
                return await work()

        return await self._breaker.call(translating)


def _names(found: Iterable[bytes]) -> list[str]:
    """The items' names. A name that is not ASCII was not written by a server, and is skipped."""
    return [item.decode() for item in found if item.isascii()]
