"""Redis, shared by the replicas, through aiocache; and the connection that `coordination/` uses too.

Redis bounds itself (`maxmemory`): where it is full and evicts nothing, puts are
refused and everything goes on. Calls are not retried here: a breaker around the
store decides whether there is a next one, and how long each may take: redis-py's
own `socket_timeout` is off, because its `asyncio.wait_for` loses cancellations in
Python 3.11. A cancelled call gives up its connection, so that no answer is ever
taken for another call's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from aiocache import RedisCache
from aiocache.serializers import NullSerializer
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError

from safelight_server.storage.base import HEADER_BYTES, StoreFullError, StoreUnavailableError, StoreUsage, check_key

PREFIX = "safelight:cache:"
MAX_CONNECTIONS = 32


class RedisConnection:
    """A pool of connections to one Redis; opens none before the first call.

    Args:
        url: redis://, rediss:// or unix://, as redis-py reads it.
        timeout_s: for connecting and for a free connection of the pool.

    Raises:
        ValueError: the URL cannot be read.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        options: dict[str, Any] = dict(parse_url(url))
        self.cache = RedisCache(
            serializer=NullSerializer(encoding=None),
            timeout=None,
            endpoint=str(options.pop("host", "127.0.0.1")),
            port=int(options.pop("port", 6379)),
            db=int(options.pop("db", 0)),
            password=options.pop("password", None),
            create_connection_timeout=timeout_s,
            pool_max_size=MAX_CONNECTIONS,
            connection_pool_class=BlockingConnectionPool,
            connection_pool_kwargs=options
            | {"timeout": timeout_s, "retry": Retry(NoBackoff(), 0), "socket_timeout": None},
        )

    @property
    def client(self) -> Redis:
        """The client of the pool, for commands that aiocache does not have."""
        client: Redis = self.cache.client
        return client

    async def close(self) -> None:
        """Closes all connections."""
        await self.client.aclose()


@contextmanager
def translated() -> Iterator[None]:
    """Turns what redis-py raises into errors of stores."""
    try:
        yield
    except OutOfMemoryError as error:
        raise StoreFullError(f"redis: {error}") from error
    except (RedisError, OSError, EOFError) as error:
        raise StoreUnavailableError(f"redis: {error}") from error


class RedisStore:
    """The tier in Redis."""

    name = "redis"

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._cache = connection.cache

    async def get(self, key: str) -> bytes | None:
        """The value."""
        with translated():
            value: bytes | None = await self._cache.get(PREFIX + key)
        return value

    async def head(self, key: str) -> bytes | None:
        """The beginning of the value."""
        with translated():
            value = await self._connection.client.getrange(PREFIX + key, 0, HEADER_BYTES - 1)
        return bytes(value) or None  # type: ignore[arg-type]  # the client does not decode

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keeps the value for `ttl_s`."""
        with translated():
            await self._cache.set(PREFIX + check_key(key), value, ttl=max(float(ttl_s), 0.001))

    async def delete(self, key: str) -> None:
        """Forgets a key."""
        with translated():
            await self._cache.delete(PREFIX + key)

    async def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """All keys with this beginning, by SCAN: Redis is never blocked, however many there are."""
        with translated():
            async for key in self._connection.client.scan_iter(match=f"{PREFIX}{prefix}*", count=1000):
                yield key.decode().removeprefix(PREFIX)

    async def usage(self) -> StoreUsage:
        """All that this Redis holds, others' keys too."""
        with translated():
            entries = await self._connection.client.dbsize()
            memory = await self._connection.client.info("memory")
        return StoreUsage(entries, memory["used_memory"])

    async def close(self) -> None:
        """The connection is its owner's to close."""
