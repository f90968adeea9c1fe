"""A fake `Coordinator` for tests, in memory and without Redis; passes the same tests as the real one."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from safelight_server.coordination.base import (
    BEGINNING,
    CommitOutcome,
    CommittedResult,
    FencedError,
    LeaderLostError,
    Lease,
    Renewal,
    StreamEvent,
)

LOOK_EVERY_S = 0.5
"""Pause between a follower's checks that its stream still has a leader."""


@dataclass(slots=True)
class _Execution:
    lease: Lease | None = None
    ends: float = 0.0
    newest: Lease | None = None
    result: CommittedResult | None = None
    events: list[StreamEvent] = field(default_factory=list)


class LocalCoordinator:
    """`Coordinator` in memory; its methods are described there.

    Args:
        max_events: events kept of one stream; the oldest are dropped beyond that.
        max_names: executions remembered; beyond that, the least recently used one without a leader is forgotten.
        clock: monotonic seconds.
    """

    def __init__(
        self, max_events: int = 1024, max_names: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_events = max_events
        self._max_names = max_names
        self._clock = clock
        self._executions: OrderedDict[str, _Execution] = OrderedDict()
        self._bills: list[StreamEvent] = []
        self._billed: dict[tuple[str, bytes], None] = {}
        self._tokens = 0
        self._places = 0
        self._changed = asyncio.Event()
        self._claims: dict[str, tuple[bytes, float]] = {}
        self._roll: set[str] = set()

    async def check(self) -> None:
        """See `Coordinator`."""

    async def acquire(self, name: str, owner: str, ttl_s: float) -> Lease | None:
        """See `Coordinator`."""
        execution = self._execution(name)
        held = self._held(execution)
        if execution.result is not None or (held is not None and held.owner != owner):
            return None
        if held is None:
            self._tokens += 1
            execution.lease = execution.newest = Lease(name, owner, self._tokens)
        execution.ends = self._clock() + ttl_s
        return execution.lease

    async def renew(self, lease: Lease, ttl_s: float) -> Renewal:
        """See `Coordinator`."""
        execution = self._execution(lease.name)
        if execution.newest not in (None, lease) or execution.result is not None:
            return Renewal.LOST
        forgotten = execution.newest is None
        execution.lease = execution.newest = lease
        execution.ends = self._clock() + ttl_s
        return Renewal.FORGOTTEN if forgotten else Renewal.HELD

    async def release(self, lease: Lease) -> bool:
        """See `Coordinator`."""
        execution = self._execution(lease.name)
        if self._held(execution) != lease:
            return False
        execution.lease, execution.newest = None, Lease(lease.name, "", 0)
        self._notify()
        return True

    async def holder(self, name: str) -> Lease | None:
        """See `Coordinator`."""
        return self._held(self._execution(name))

    async def publish(self, lease: Lease, data: bytes) -> str:
        """See `Coordinator`."""
        if self._execution(lease.name).newest != lease:
            raise FencedError(lease.name)
        return await self.append(lease.name, data)

    async def append(self, name: str, data: bytes) -> str:
        """See `Coordinator`."""
        event = self._event(data)
        events = self._execution(name).events
        events.append(event)
        del events[: -self._max_events]
        self._notify()
        return event.place

    async def follow(self, name: str, after: str = BEGINNING, leader: bool = True) -> AsyncIterator[StreamEvent]:
        """See `Coordinator`."""
        while True:
            changed = self._changed
            execution = self._execution(name)
            ended = leader and execution.result is not None
            lost = leader and not ended and self._held(execution) is None
            for event in [event for event in execution.events if _number(event.place) > _number(after)]:
                after = event.place
                yield event
            if ended:
                return
            if lost:
                raise LeaderLostError(name)
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await changed.wait()
            except TimeoutError:
                continue

    async def commit(self, lease: Lease, pointer: str, bill: bytes) -> CommitOutcome:
        """See `Coordinator`."""
        execution = self._execution(lease.name)
        if execution.result is not None:
            mine = (execution.result.owner, execution.result.token) == (lease.owner, lease.token)
            return CommitOutcome.COMMITTED if mine else CommitOutcome.TAKEN
        if execution.newest != lease:
            return CommitOutcome.FENCED
        execution.result = CommittedResult(pointer, lease.owner, lease.token)
        execution.lease = None
        if (lease.name, bill) not in self._billed:
            self._billed[lease.name, bill] = None
            self._bills.append(self._event(bill))
        del self._bills[: -self._max_names]
        while len(self._billed) > self._max_names:
            del self._billed[next(iter(self._billed))]
        self._notify()
        return CommitOutcome.COMMITTED

    async def result(self, name: str) -> CommittedResult | None:
        """See `Coordinator`."""
        return self._execution(name).result

    async def forget(self, name: str, result: CommittedResult) -> bool:
        """See `Coordinator`."""
        if self._execution(name).result != result:
            return False
        del self._executions[name]
        return True

    async def bills(self, after: str = BEGINNING, limit: int = 1000) -> list[StreamEvent]:
        """See `Coordinator`."""
        return [bill for bill in self._bills if _number(bill.place) > _number(after)][:limit]

    async def read(self, name: str) -> list[StreamEvent]:
        """See `Coordinator`."""
        return list(self._execution(name).events)

    async def expire(self, name: str, ttl_s: float) -> None:
        """Does nothing: `max_names` bounds the streams."""

    async def claim(self, name: str, value: bytes, ttl_s: float, instead_of: bytes | None = None) -> bytes:
        """See `Coordinator`."""
        now = self._clock()
        self._claims = {known: claim for known, claim in self._claims.items() if claim[1] > now}
        there = self._claims.get(name, (None, 0.0))[0]
        if there is None or there == instead_of:
            self._claims[name] = (value, now + ttl_s)
            return value
        return there

    async def unclaim(self, name: str, value: bytes, ttl_s: float = 0.0) -> None:
        """See `Coordinator`."""
        if self._claims.get(name, (None, 0.0))[0] == value:
            self._claims[name] = (value, self._clock() + ttl_s)

    async def register(self, name: str) -> None:
        """See `Coordinator`."""
        self._roll.add(name)

    async def unregister(self, name: str) -> None:
        """See `Coordinator`."""
        self._roll.discard(name)

    async def unowned(self) -> list[str]:
        """See `Coordinator`."""
        return [name for name in self._roll if self._held(self._execution(name)) is None]

    async def close(self) -> None:
        """Does nothing."""

    def _execution(self, name: str) -> _Execution:
        execution = self._executions.setdefault(name, _Execution())
        self._executions.move_to_end(name)
        if len(self._executions) > self._max_names:
            idle = (known for known, other in self._executions.items() if self._held(other) is None and known != name)
            if (oldest := next(idle, None)) is not None:
                del self._executions[oldest]
        return execution

    def _held(self, execution: _Execution) -> Lease | None:
        return execution.lease if self._clock() < execution.ends else None

    def _event(self, data: bytes) -> StreamEvent:
        self._places += 1
        return StreamEvent(f"{self._places}-0", data)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _number(place: str) -> int:
    return int(place.partition("-")[0])
