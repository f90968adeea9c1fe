"""The service that replicas share, with Redis' rules, and the network to it.

A request is executed once or never, at once or late, and its answer may be
lost: whoever asked has given up meanwhile and does not know. Requests that wait
while the service is paused are executed when it goes on, in any order, as those
of Redis' connections are.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextvars import copy_context
from typing import Any, TypeVar

from safelight_server.coordination.base import (
    BEGINNING,
    CommitOutcome,
    CommittedResult,
    Coordinator,
    FencedError,
    LeaderLostError,
    Lease,
    Renewal,
    StreamEvent,
)
from safelight_server.storage.base import StoreUnavailableError, StoreUsage
from safelight_server.storage.clock import SharedClock

from tests.simulation.clock import EPOCH_S, HOST, SERVICE, VirtualLoop
from tests.support.local_coordinator import LocalCoordinator

T = TypeVar("T")
TIMEOUT_S = 0.25
LOOK_EVERY_S = 0.5
RETRY_S = 0.5
DOUBT_S = 2.0
"""How long after an outage a host may not know yet that it is over."""
LATE_S = (0.3, 4.0)
"""How long a request may be under way that is late."""


class Service(LocalCoordinator):
    """The rules of the local coordinator, with streams that expire, and a key-value store beside it.

    Args:
        on_published: told the stream's name and data of every event that was taken.

    Attributes:
        bills_of: how often each execution was billed, by its name.
    """

    def __init__(self, loop: VirtualLoop, on_published: Callable[[str, bytes], None]) -> None:
        super().__init__(clock=loop.time)
        self.bills_of = Counter[str]()
        self._loop = loop
        self._on_published = on_published
        self._expiring: dict[str, float] = {}
        self._waiting: dict[str, list[asyncio.Future[list[StreamEvent]]]] = {}
        self.kept: dict[str, tuple[bytes, float]] = {}

    async def time(self) -> float:
        """Its Unix time."""
        return EPOCH_S + self._clock()

    async def publish(self, lease: Lease, data: bytes) -> str:
        """See `Coordinator`."""
        place = await super().publish(lease, data)
        self._expiring.pop(lease.name, None)
        self._on_published(lease.name, data)
        return place

    async def append(self, name: str, data: bytes) -> str:
        """See `Coordinator`."""
        self._forget_expired(name)
        place = await super().append(name, data)
        self._wake(name)
        return place

    async def commit(self, lease: Lease, pointer: str, bill: bytes) -> CommitOutcome:
        """See `Coordinator`."""
        before = len(self._bills)
        outcome = await super().commit(lease, pointer, bill)
        self.bills_of[lease.name] += len(self._bills) - before
        self._wake(lease.name)
        return outcome

    def lose_memory(self) -> None:
        """Everything is gone, as of a Redis that starts again without its data. Places go on: they come from its clock."""
        for memory in (self._executions, self._bills, self._billed, self._claims, self._roll, self._expiring):
            memory.clear()
        self.bills_of.clear()
        self.kept.clear()
        self._tokens = 0

    async def read(self, name: str) -> list[StreamEvent]:
        """See `Coordinator`."""
        self._forget_expired(name)
        return await super().read(name)

    async def expire(self, name: str, ttl_s: float) -> None:
        """See `Coordinator`."""
        self._expiring[name] = self._clock() + ttl_s

    async def unowned(self) -> list[str]:
        """See `Coordinator`."""
        return sorted(await super().unowned())

    async def after(self, name: str, place: str) -> list[StreamEvent]:
        """The events of a stream after a place."""
        return [event for event in await self.read(name) if _number(event.place) > _number(place)]

    async def blocked(self, name: str, place: str, look_every_s: float | None) -> list[StreamEvent]:
        """The events after a place as soon as there are any, none after a while. Awaited by the network alone."""
        if not (there := await self.after(name, place)):
            waiting: asyncio.Future[list[StreamEvent]] = self._loop.create_future()
            waiters = self._waiting.setdefault(name, [])
            waiters.append(waiting)
            if look_every_s is not None:
                self._loop.call_later(look_every_s, self._wake_one, waiting, context=SERVICE)
            await waiting
            there = await self.after(name, place)
        return there

    async def get(self, key: str) -> bytes | None:
        """A value of the store."""
        value, expires = self.kept.get(key, (None, 0.0))
        return value if self._clock() < expires else None

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keeps a value."""
        self.kept[key] = value, self._clock() + ttl_s

    async def delete(self, key: str) -> None:
        """Forgets a value."""
        self.kept.pop(key, None)

    def _forget_expired(self, name: str) -> None:
        if self._expiring.get(name, float("inf")) <= self._clock():
            del self._expiring[name]
            self._execution(name).events.clear()

    def _wake(self, name: str) -> None:
        for waiting in self._waiting.pop(name, ()):
            self._wake_one(waiting)

    @staticmethod
    def _wake_one(waiting: asyncio.Future[list[StreamEvent]]) -> None:
        if not waiting.done():
            waiting.set_result([])


class Network:
    """Between replicas and the service, with the weather on it.

    Attributes:
        out: nothing answers (a restart): calls fail at once.
        paused: calls are taken and executed when the pause is over.
        cut: hosts that do not reach the service.
        p_lost, p_deaf, p_late: of one request: never executed; executed but not answered; executed late.
    """

    def __init__(self, loop: VirtualLoop, service: Service, chance: random.Random) -> None:
        self.out = False
        self.paused = False
        self.cut: set[str] = set()
        self.p_lost = self.p_deaf = self.p_late = 0.0
        self._loop = loop
        self._service = service
        self._chance = chance
        self._waiting: list[Callable[[], None]] = []
        self._doubtful: dict[str, float] = {}

    def doubtful(self, host: str) -> bool:
        """Whether a host may not know yet that it can reach the service again."""
        return self._loop.time() < self._doubtful.get(host, 0.0)

    def doubt(self, hosts: Iterable[str], for_s: float) -> float:
        """They do not reach the service, all of the time or now and then, for so long. Returns when they are sure again."""
        until = self._loop.time() + for_s + DOUBT_S
        for host in hosts:
            self._doubtful[host] = max(self._doubtful.get(host, 0.0), until)
        return until

    def go_on(self) -> None:
        """The pause is over."""
        self.paused = False
        waiting, self._waiting = self._waiting, []
        self._chance.shuffle(waiting)
        for execute in waiting:
            self._loop.call_soon(execute, context=SERVICE)

    async def call(self, work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float = TIMEOUT_S) -> T:
        """What the service answers.

        Raises:
            StoreUnavailableError: no answer came in time, and nobody knows whether it was done.
        """
        host, draw = HOST.get(), self._chance.random()
        if self.out:
            await asyncio.sleep(0)
            raise StoreUnavailableError("out")
        answer: asyncio.Future[T] = self._loop.create_future()
        lost = (host is not None and host.name in self.cut) or draw < self.p_lost
        deaf = late = False
        give_up = functools.partial(
            self._loop.call_at, self._loop.time() + timeout_s, _give_up, answer, context=copy_context()
        )
        if not lost:
            draw -= self.p_lost
            deaf = draw < self.p_deaf
            late = not deaf and draw - self.p_deaf < self.p_late
            delay_s = self._chance.uniform(*LATE_S) if late else self._chance.uniform(0.0002, 0.002)
            execute = self._executing(work, None if deaf else answer, give_up)
            self._loop.call_later(delay_s, execute, context=SERVICE)
        if lost or deaf or late:  # else the answer comes in time, unless a pause begins in between
            give_up()
        return await answer

    def _executing(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        answer: asyncio.Future[T] | None,
        give_up: Callable[[], object],
    ) -> Callable[[], None]:
        def execute() -> None:
            if self.paused:
                self._waiting.append(execute)
                give_up()
                return
            coroutine = work()
            try:
                coroutine.send(None)
            except StopIteration as stop:
                self._answer(answer, stop.value, None)
            except FencedError as error:
                self._answer(answer, None, error)
            else:  # it waits for events
                coroutine.close()
                raise AssertionError("a call of the service waits")

        return execute

    def _answer(self, answer: asyncio.Future[Any] | None, value: object, error: Exception | None) -> None:
        def arrive() -> None:
            if answer is not None and not answer.done():
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(value)

        self._loop.call_later(self._chance.uniform(0.0002, 0.002), arrive, context=SERVICE)

    def is_fine(self) -> bool:
        """Whether each call of the host that asks is answered at once."""
        return not self.away() and self.p_lost == self.p_deaf == self.p_late == 0.0

    def away(self) -> bool:
        """Whether the host that asks does not reach the service now."""
        host = HOST.get()
        return self.out or self.paused or (host is not None and host.name in self.cut)

    async def wait(self, name: str, place: str, look_every_s: float | None) -> list[StreamEvent]:
        """Events after a place, or none after a while; None: it waits until there are any.

        Raises:
            StoreUnavailableError: as of `call`.
        """
        if self.away():
            await asyncio.sleep(TIMEOUT_S)
            raise StoreUnavailableError("out")
        waiting = self._loop.create_task(self._service.blocked(name, place, look_every_s), context=SERVICE.copy())
        try:
            events = await waiting
        finally:
            waiting.cancel()
        if self.away():
            raise StoreUnavailableError("out")
        return events


class Connection:
    """The network as one replica uses it: its clock is set before anything else is asked, as `RedisConnection` does."""

    def __init__(self, network: Network, service: Service, clock: SharedClock) -> None:
        self._network = network
        self._service = service
        self._clock = clock
        self._open = False

    async def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """See `Network.call`."""
        if not self._open:
            await self._clock.measure(self._service.time)
            self._open = True
        return await self._network.call(work)

    async def check(self) -> None:
        """Sets the clock by the service's time."""
        if self._network.is_fine():  # asked twice a second: no timers, no turns of the loop
            await self._clock.measure(self._service.time)
        else:
            await self._clock.measure(lambda: self._network.call(self._service.time))

    async def wait(self, name: str, place: str, look_every_s: float | None) -> list[StreamEvent]:
        """See `Network.wait`."""
        return await self._network.wait(name, place, look_every_s)


class RemoteCoordinator(Coordinator):
    """The service as one replica sees it; see `Coordinator`."""

    def __init__(self, network: Connection, service: Service) -> None:
        self._network = network
        self._service = service

    async def check(self) -> None:
        await self._network.check()

    async def acquire(self, name: str, owner: str, ttl_s: float) -> Lease | None:
        return await self._network.call(lambda: self._service.acquire(name, owner, ttl_s))

    async def renew(self, lease: Lease, ttl_s: float) -> Renewal:
        return await self._network.call(lambda: self._service.renew(lease, ttl_s))

    async def release(self, lease: Lease) -> bool:
        return await self._network.call(lambda: self._service.release(lease))

    async def holder(self, name: str) -> Lease | None:
        return await self._network.call(lambda: self._service.holder(name))

    async def publish(self, lease: Lease, data: bytes) -> str:
        return await self._network.call(lambda: self._service.publish(lease, data))

    async def append(self, name: str, data: bytes) -> str:
        return await self._network.call(lambda: self._service.append(name, data))

    async def follow(self, name: str, after: str = BEGINNING, leader: bool = True) -> AsyncIterator[StreamEvent]:
        while True:
            over, events = False, []
            try:
                events = await self._network.wait(name, after, LOOK_EVERY_S if leader else None)
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_S)
            else:
                if not events and leader and (over := await self._is_over(name)):
                    try:
                        events = await self._network.call(lambda: self._service.after(name, after))
                    except StoreUnavailableError:
                        over = False
            for event in events:
                after = event.place
                yield event
            if over:
                return

    async def _is_over(self, name: str) -> bool:
        try:
            if await self.result(name) is not None:
                return True
            if await self.holder(name) is None:
                if await self.result(name) is not None:
                    return True
                raise LeaderLostError(name)
        except StoreUnavailableError:
            pass
        return False

    async def commit(self, lease: Lease, pointer: str, bill: bytes) -> CommitOutcome:
        return await self._network.call(lambda: self._service.commit(lease, pointer, bill))

    async def result(self, name: str) -> CommittedResult | None:
        return await self._network.call(lambda: self._service.result(name))

    async def forget(self, name: str, result: CommittedResult) -> bool:
        return await self._network.call(lambda: self._service.forget(name, result))

    async def bills(self, after: str = BEGINNING, limit: int = 1000) -> list[StreamEvent]:
        return await self._network.call(lambda: self._service.bills(after, limit))

    async def read(self, name: str) -> list[StreamEvent]:
        return await self._network.call(lambda: self._service.read(name))

    async def expire(self, name: str, ttl_s: float) -> None:
        await self._network.call(lambda: self._service.expire(name, ttl_s))

    async def claim(self, name: str, value: bytes, ttl_s: float, instead_of: bytes | None = None) -> bytes:
        return await self._network.call(lambda: self._service.claim(name, value, ttl_s, instead_of))

    async def unclaim(self, name: str, value: bytes, ttl_s: float = 0.0) -> None:
        await self._network.call(lambda: self._service.unclaim(name, value, ttl_s))

    async def register(self, name: str) -> None:
        await self._network.call(lambda: self._service.register(name))

    async def unregister(self, name: str) -> None:
        await self._network.call(lambda: self._service.unregister(name))

    async def unowned(self) -> list[str]:
        return await self._network.call(lambda: self._service.unowned())

    async def close(self) -> None:
        """Nothing to let go of."""


class RemoteStore:
    """The shared tier as one replica sees it; see `Store`."""

    name = "redis"

    def __init__(self, network: Connection, service: Service) -> None:
        self._network = network
        self._service = service

    async def get(self, key: str) -> bytes | None:
        return await self._network.call(lambda: self._service.get(key))

    async def head(self, key: str) -> bytes | None:
        value = await self.get(key)
        return None if value is None else value[:64]

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        await self._network.call(lambda: self._service.put(key, value, ttl_s))

    async def delete(self, key: str) -> None:
        await self._network.call(lambda: self._service.delete(key))

    async def keys(self, prefix: str = "") -> AsyncIterator[str]:
        for key in [key for key in self._service.kept if key.startswith(prefix)]:
            yield key

    async def usage(self) -> StoreUsage:
        return StoreUsage(len(self._service.kept), 0)

    async def close(self) -> None:
        """Nothing to let go of."""


def _give_up(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(StoreUnavailableError("no answer in time"))


def _number(place: str) -> int:
    return int(place.partition("-")[0])
