"""The Redis tier, shared by the replicas, through aiocache; and the connection pool that `coordination/` uses too.

Redis bounds its own memory (`maxmemory`). If it is full and its policy evicts nothing, it refuses writes and the server
goes on without them. A cancelled call closes its connection, so that its late answer cannot reach another call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from aiocache import RedisCache
from aiocache.serializers import NullSerializer
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, OutOfMemoryError, RedisError, ResponseError

from safelight_server.storage.base import (
    HEADER_BYTES,
    MalformedValueError,
    StoreFullError,
    StoreUnavailableError,
    StoreUsage,
    check_key,
)
from safelight_server.storage.clock import SharedClock

log = structlog.get_logger(__name__)

PREFIX = "safelight:cache:"
MAX_CONNECTIONS = 32


class RedisConnection:
    """A pool of connections to one Redis. The first call opens the first connection.

    Args:
        url: redis://, rediss:// or unix://, as redis-py reads it.
        timeout_s: for connecting, and for waiting until a connection of the pool is free.
        clock: set by Redis' time whenever a connection is opened, before anything else is done on it, and by `check`.

    Raises:
        ValueError: the URL cannot be read.
    """

    def __init__(self, url: str, timeout_s: float, clock: SharedClock | None = None) -> None:
        self._clock = clock or SharedClock()
        self._may_ask_time = True
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
            # No retries and no socket timeout: the breaker around the store decides both. redis-py's `socket_timeout`
            # uses `asyncio.wait_for`, which loses cancellations in Python 3.11.
            connection_pool_kwargs=options
            | {
                "timeout": timeout_s,
                "retry": Retry(NoBackoff(), 0),
                "socket_timeout": None,
                "redis_connect_func": self._connected,
            },
        )

    @property
    def client(self) -> Redis:
        """The redis-py client of the pool, for commands that aiocache does not have."""
        client: Redis = self.cache.client
        return client

    async def check(self) -> None:
        """Asks Redis for its time, and sets the clock by it.

        Raises:
            RedisError, OSError: Redis does not answer.
        """
        await self._measure(self.client.time)

    async def _connected(self, connection: AbstractConnection) -> None:
        await connection.on_connect()

        async def time() -> tuple[int, int]:
            await connection.send_command("TIME", check_health=False)
            seconds, microseconds = await connection.read_response()
            return int(seconds), int(microseconds)

        await self._measure(time)

    async def _measure(self, ask: Callable[[], Awaitable[tuple[int, int]]]) -> None:
        async def unix_s() -> float:
            seconds, microseconds = await ask()
            return seconds + microseconds / 1e6

        try:
            await self._clock.measure(unix_s)
        except NoPermissionError:  # an answer all the same, so Redis is up
            if self._may_ask_time:
                log.warning("Redis refuses TIME to this user; replicas agree only as far as their machines' clocks do")
            self._may_ask_time = False

    async def close(self) -> None:
        """Closes all connections."""
        await self.client.aclose()


@contextmanager
def translated() -> Iterator[None]:
    """Converts redis-py's errors to `StoreError`."""
    try:
        yield
    except OutOfMemoryError as error:
        raise StoreFullError(f"redis: {error}") from error
    except ResponseError as error:
        # the value of one key is of another type. A script has the word in the middle of its message
        kind = MalformedValueError if "WRONGTYPE" in str(error) else StoreUnavailableError
        raise kind(f"redis: {error}") from error
    except (RedisError, OSError, EOFError) as error:
        raise StoreUnavailableError(f"redis: {error}") from error


class RedisStore:
    """A `Store` in Redis."""

    name = "redis"

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._cache = connection.cache

    async def get(self, key: str) -> bytes | None:
        """Returns the value, or None."""
        with translated():
            value: bytes | None = await self._cache.get(PREFIX + key)
        return value

    async def head(self, key: str) -> bytes | None:
        """Returns the first `HEADER_BYTES` of the value, or None."""
        with translated():
            value = await self._connection.client.getrange(PREFIX + key, 0, HEADER_BYTES - 1)
        return bytes(value) or None  # type: ignore[arg-type]  # the client does not decode

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Stores the value for `ttl_s` seconds."""
        with translated():
            await self._cache.set(PREFIX + check_key(key), value, ttl=max(float(ttl_s), 0.001))

    async def delete(self, key: str) -> None:
        """Deletes a key."""
        with translated():
            await self._cache.delete(PREFIX + key)

    async def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """Lists the keys that begin with `prefix` by SCAN, which does not block Redis however many keys it holds."""
        with translated():
            async for key in self._connection.client.scan_iter(match=f"{PREFIX}{prefix}*", count=1000):
                if key.isascii():  # otherwise no server has written it
                    yield key.decode().removeprefix(PREFIX)

    async def usage(self) -> StoreUsage:
        """Returns the number of keys and the memory of the whole Redis, including keys of other programs."""
        with translated():
            entries = await self._connection.client.dbsize()
            memory = await self._connection.client.info("memory")
        return StoreUsage(entries, memory["used_memory"])

    async def close(self) -> None:
        """Does nothing: the owner of the connection closes it."""
