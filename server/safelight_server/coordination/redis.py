"""Coordination of replicas through one Redis (or a primary with replicas; not a cluster).

Each rule that reads and then writes is one script, so that it is atomic. The fence
counter has no time to live. If Redis comes back empty, tokens begin anew, and the
owner that is stored with a token still distinguishes the holders. Names are
remembered for `memory_s` after their last use.

All streams that this replica follows are read by one blocking call on one
connection, however many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from importlib.resources import files
from typing import Any, TypeVar

import structlog
from redis.commands.core import AsyncScript

from safelight_server.coordination.base import (
    BEGINNING,
    CommitOutcome,
    CommittedResult,
    FencedError,
    LeaderLostError,
    Lease,
    Renewal,
    StreamEvent,
    place_order,
)
from safelight_server.storage.base import MalformedValueError, StoreError
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.redis import RedisConnection, translated
from safelight_server.telemetry.background import keep_running

log = structlog.get_logger(__name__)

T = TypeVar("T")
PREFIX = "safelight:run:"
FENCE = f"{PREFIX}fence"
BILLS = f"{PREFIX}bills"
REGISTRY = f"{PREFIX}roll"  # a name that replicas of earlier versions use as well
SCRIPTS = ("acquire", "renew", "release", "publish", "commit", "forget", "claim", "unclaim")
BLOCK_S = 0.1
"""How long one read waits for events. A new follower waits at most as long until it is included in a read."""
LOOK_EVERY_S = 0.5
"""Without events, a follower checks so often whether there still is a leader."""
RETRY_S = 0.25
READ_COUNT = 256
ENDED_S = 60.0
"""How long the events of a committed execution are kept for late followers."""
BILLED_S = 3600.0
"""How long a repeated bill is recognised; a commit gives up long before."""


class RedisCoordinator:
    """See `Coordinator`.

    Args:
        connection: the connection to Redis, shared with the tier in Redis.
        breaker: the breaker of that connection.
        max_events: approximate bound on the events of one stream.
        max_bills: approximate bound on the stream of bills; the oldest are dropped (docs/operations/billing.md).
        memory_s: how long names, results and events are remembered.
    """

    def __init__(
        self,
        connection: RedisConnection,
        breaker: Breaker,
        max_events: int = 1024,
        max_bills: int = 1_000_000,
        memory_s: float = 86_400.0,
    ) -> None:
        self._connection = connection
        self._redis: Any = connection.client  # its stubs leave open whether answers are decoded: they are not
        self._breaker = breaker
        self._max_events = max_events
        self._max_bills = max_bills
        self._memory_ms = int(memory_s * 1000)
        folder = files(__package__).joinpath("scripts")
        self._scripts: dict[str, AsyncScript] = {
            name: self._redis.register_script(folder.joinpath(f"{name}.lua").read_text()) for name in SCRIPTS
        }
        self._followed: dict[_Follower, None] = {}
        self._following = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """See `Coordinator`."""
        await self._call(self._connection.check)

    async def acquire(self, name: str, owner: str, ttl_s: float) -> Lease | None:
        """See `Coordinator`."""
        keys = [_key("lease", name), _key("token", name), _key("result", name), FENCE]
        token = await self._run("acquire", keys, owner, _ms(ttl_s), self._memory_ms)
        return None if token is None else Lease(name, owner, int(token))

    async def renew(self, lease: Lease, ttl_s: float) -> Renewal:
        """See `Coordinator`."""
        keys = [_key(kind, lease.name) for kind in ("lease", "token", "result")]
        return Renewal(await self._run("renew", keys, _holder(lease), _ms(ttl_s), self._memory_ms))

    async def release(self, lease: Lease) -> bool:
        """See `Coordinator`."""
        return bool(await self._run("release", [_key("lease", lease.name), _key("token", lease.name)], _holder(lease)))

    async def holder(self, name: str) -> Lease | None:
        """See `Coordinator`."""
        value = await self._call(lambda: self._redis.get(_key("lease", name)))
        if value is None:
            return None
        with _checking_value_of(_key("lease", name)):
            owner, _, token = value.decode().rpartition("|")
            return Lease(name, owner, int(token))

    async def publish(self, lease: Lease, data: bytes) -> str:
        """See `Coordinator`."""
        keys = [_key("token", lease.name), _key("events", lease.name)]
        place = await self._run("publish", keys, _holder(lease), data, self._max_events, self._memory_ms)
        if place is None:
            raise FencedError(lease.name)
        return str(place.decode())

    async def append(self, name: str, data: bytes) -> str:
        """See `Coordinator`."""
        key = _key("events", name)

        async def appended() -> bytes:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.xadd(key, {"d": data}, maxlen=self._max_events, approximate=True)
                pipe.pexpire(key, self._memory_ms)
                place: bytes = (await pipe.execute())[0]
                return place

        return (await self._call(appended)).decode()

    async def follow(self, name: str, after: str = BEGINNING, leader: bool = True) -> AsyncIterator[StreamEvent]:
        """See `Coordinator`."""
        follower = _Follower(_key("events", name), after)
        with contextlib.suppress(StoreError):
            await self._catch_up(follower)
        self._followed[follower] = None
        self._following.set()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(keep_running(self._read, "coordination reader"))
        try:
            while True:
                over = False
                try:
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await follower.changed.wait()
                except TimeoutError:
                    over = leader and await self._is_over(name, follower)
                over = over or (leader and follower.ended)
                if follower.fault is not None:
                    raise follower.fault
                for event in follower.take():
                    yield event
                if over:
                    return
        finally:
            self._followed.pop(follower, None)

    async def _is_over(self, name: str, follower: _Follower) -> bool:
        """Whether a result is committed. If so, the follower has all events before it.

        Raises:
            LeaderLostError: nobody holds the lease, and there is no result.
        """
        try:
            over = await self.result(name) is not None
            if not over and await self.holder(name) is None:
                over = await self.result(name) is not None  # it may have been committed between the two reads
                if not over:
                    raise LeaderLostError(name)
            if over:
                await self._catch_up(follower)
        except StoreError:
            return False
        return over

    async def _catch_up(self, follower: _Follower) -> None:
        found = await self._call(lambda: self._redis.xread({follower.key: follower.place}))
        for _, entries in found or ():
            follower.give(entries)
        follower.changed.set()

    async def commit(self, lease: Lease, pointer: str, bill: bytes) -> CommitOutcome:
        """See `Coordinator`."""
        billed = _key("billed", f"{lease.name}:{hashlib.sha256(bill).hexdigest()}")
        keys = [*(_key(kind, lease.name) for kind in ("token", "result", "lease", "events")), BILLS, billed]
        ttls = min(_ms(ENDED_S), self._memory_ms), min(_ms(BILLED_S), self._memory_ms)
        arguments = (lease.owner, str(lease.token), pointer, bill, self._memory_ms, self._max_bills, *ttls)
        return CommitOutcome((await self._run("commit", keys, *arguments)).decode())

    async def result(self, name: str) -> CommittedResult | None:
        """See `Coordinator`."""
        found = await self._call(lambda: self._redis.hgetall(_key("result", name)))
        if not found:
            return None
        with _checking_value_of(_key("result", name)):
            return CommittedResult(found[b"pointer"].decode(), found[b"owner"].decode(), int(found[b"token"]))

    async def forget(self, name: str, result: CommittedResult) -> bool:
        """See `Coordinator`."""
        keys = [_key("result", name), _key("events", name), _key("token", name)]
        return bool(await self._run("forget", keys, result.owner, str(result.token)))

    async def bills(self, after: str = BEGINNING, limit: int = 1000) -> list[StreamEvent]:
        """See `Coordinator`."""
        found = await self._call(lambda: self._redis.xrange(BILLS, min=f"({after}", count=limit))
        return [StreamEvent(place.decode(), fields.get(b"d", b"")) for place, fields in found]

    async def read(self, name: str) -> list[StreamEvent]:
        """See `Coordinator`."""
        found = await self._call(lambda: self._redis.xrange(_key("events", name)))
        return [StreamEvent(place.decode(), fields[b"d"]) for place, fields in found if b"d" in fields]

    async def expire(self, name: str, ttl_s: float) -> None:
        """See `Coordinator`."""
        await self._call(lambda: self._redis.pexpire(_key("events", name), _ms(ttl_s)))

    async def claim(self, name: str, value: bytes, ttl_s: float, instead_of: bytes | None = None) -> bytes:
        """See `Coordinator`."""
        return bytes(await self._run("claim", [_key("claim", name)], value, _ms(ttl_s), instead_of or b""))

    async def unclaim(self, name: str, value: bytes, ttl_s: float = 0.0) -> None:
        """See `Coordinator`."""
        await self._run("unclaim", [_key("claim", name)], value, _ms(ttl_s))

    async def register(self, name: str) -> None:
        """See `Coordinator`."""
        await self._call(lambda: self._redis.sadd(REGISTRY, name))

    async def unregister(self, name: str) -> None:
        """See `Coordinator`."""
        await self._call(lambda: self._redis.srem(REGISTRY, name))

    async def unowned(self) -> list[str]:
        """See `Coordinator`."""
        registered = await self._call(lambda: self._redis.smembers(REGISTRY))
        if odd := [name for name in registered if not name.isascii()]:  # not written by any server
            log.warning("removed invalid names from the registry", names=[repr(name) for name in odd])
            await self._call(lambda: self._redis.srem(REGISTRY, *odd))
        names = [name.decode() for name in registered if name.isascii()]
        if not names:
            return []
        leases = await self._call(lambda: self._redis.mget([_key("lease", name) for name in names]))
        return [name for name, lease in zip(names, leases, strict=True) if lease is None]

    async def close(self) -> None:
        """Ends the reading task. The connection is closed by its owner."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader

    async def _run(self, script: str, keys: list[str], *arguments: str | bytes | int) -> Any:
        return await self._call(lambda: self._scripts[script](keys=keys, args=list(arguments)))

    async def _call(self, work: Callable[[], Awaitable[T]], extra_s: float = 0.0) -> T:
        async def translating() -> T:
            with translated():
                return await work()

        return await self._breaker.call(translating, extra_s=extra_s)

    async def _read(self) -> None:
        while True:
            if not self._followed:
                self._following.clear()
                await self._following.wait()
            places: dict[str, str] = {}
            for follower in self._followed:
                if follower.fault is not None:
                    continue
                before = places.get(follower.key)
                if before is None or place_order(follower.place) < place_order(before):
                    places[follower.key] = follower.place
            read = lambda: self._redis.xread(places, count=READ_COUNT, block=_ms(BLOCK_S))  # noqa: B023, E731
            if not places:
                await asyncio.sleep(BLOCK_S)
                continue
            try:
                found = await self._call(read, BLOCK_S)
            except MalformedValueError:
                await self._drop_malformed(places)
                continue
            except StoreError:
                await asyncio.sleep(RETRY_S)
                continue
            for key, entries in found or ():
                since = places[key.decode()]
                for follower in self._followed:  # a follower that came meanwhile with an earlier place must not skip
                    if follower.key == key.decode() and place_order(follower.place) >= place_order(since):
                        follower.give(entries)

    async def _drop_malformed(self, places: Mapping[str, str]) -> None:
        """Ends the followers of keys that are no streams: one such key makes the read of all streams fail."""
        for key, place in places.items():
            try:
                await self._call(lambda: self._redis.xread({key: place}, count=1))  # noqa: B023
            except MalformedValueError as error:
                log.warning("what is no stream cannot be followed", key=key)
                for follower in self._followed:
                    if follower.key == key:
                        follower.fail(error)
            except StoreError:
                return


class _Follower:
    """One reader of a stream, with the events that it has not taken yet."""

    def __init__(self, key: str, place: str) -> None:
        self.key = key
        self.place = place
        self.changed = asyncio.Event()
        self.ended = False
        self.fault: MalformedValueError | None = None
        self._events: list[StreamEvent] = []

    def give(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        for place, fields in entries:
            if place_order(place.decode()) <= place_order(self.place):
                continue
            self.place = place.decode()
            if b"d" in fields:
                self._events.append(StreamEvent(self.place, fields[b"d"]))
            elif b"end" in fields:
                self.ended = True
            self.changed.set()

    def fail(self, fault: MalformedValueError) -> None:
        self.fault = fault
        self.changed.set()

    def take(self) -> list[StreamEvent]:
        events, self._events = self._events, []
        self.changed.clear()
        return events


@contextlib.contextmanager
def _checking_value_of(key: str) -> Iterator[None]:
    """Turns errors in parsing the value of a key into MalformedValueError."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise MalformedValueError(f"redis: {key} has a value that no server has written") from error


def _key(kind: str, name: str) -> str:
    return f"{PREFIX}{kind}:{name}"


def _holder(lease: Lease) -> str:
    return f"{lease.owner}|{lease.token}"


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
