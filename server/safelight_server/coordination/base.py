"""Leases, events and commits of executions, by name.

A *lease* says who computes; it ends unless renewed, so that another replica can
take over from one that died. Its *token* grows with every holder of any name:
whatever a leader writes carries it, and is refused when a later holder exists
(fencing), however late it arrives. *Events* are one stream for each execution,
read from any place on. A *commit* publishes the result's pointer and the bill
together, once: what is pointed to is immutable and named by its content, so that
what a leader wrote and never committed is only garbage.

Names are made as keys of the cache are: HMACs, nothing that tells contents.
Events and bills are opaque; seal what must not be read in Redis.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol

BEGINNING = "0-0"
"""The place before a stream's first event."""


def place_order(place: str) -> tuple[int, int]:
    """The sort key of a place in a stream."""
    milliseconds, _, number = place.partition("-")
    return int(milliseconds), int(number or 0)


class FencedError(Exception):
    """The lease was taken over. Its former holder must stop writing."""


class LeaderLostError(Exception):
    """Nobody holds the lease of a followed execution and it has no result. Someone should take over."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to compute `name`; `owner` is unique to one attempt of one replica."""

    name: str
    owner: str
    token: int


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event and its place in the stream, from which reading goes on."""

    place: str
    data: bytes


@dataclass(frozen=True, slots=True)
class CommittedResult:
    """A committed result: the pointer to it, and the holder who committed it."""

    pointer: str
    owner: str
    token: int


class CommitOutcome(Enum):
    """How a commit ended."""

    COMMITTED = "committed"  # by this lease, now or at an earlier try whose answer was lost
    TAKEN = "taken"  # another holder has committed before: its result counts
    FENCED = "fenced"  # another holder is computing


class Renewal(IntEnum):
    """How the renewal of a lease ended; false where it is not held."""

    LOST = 0  # another has held it since, it was given back, or a result is committed
    HELD = 1
    FORGOTTEN = 2  # held, but the service had lost its memory: of the name it has nothing else


class Coordinator(Protocol):
    """The service that replicas share. A method that raises `StoreError` may have taken effect or not."""

    async def check(self) -> None:
        """Asks the service for a sign of life, and sets the clock that replicas share by its answer."""

    async def acquire(self, name: str, owner: str, ttl_s: float) -> Lease | None:
        """Acquires the lease; None if another holds it or a result is committed. The same owner gets the same lease."""

    async def renew(self, lease: Lease, ttl_s: float) -> Renewal:
        """Keeps the lease for `ttl_s` from now, also one that ran out where nobody has held it since."""

    async def release(self, lease: Lease) -> bool:
        """Releases the lease. False if it was no longer held."""

    async def holder(self, name: str) -> Lease | None:
        """Returns who holds the lease now."""

    async def publish(self, lease: Lease, data: bytes) -> str:
        """Appends an event to the execution's stream and returns its place.

        Raises:
            FencedError: the lease was taken over.
        """

    async def append(self, name: str, data: bytes) -> str:
        """Appends an event to a stream that has no leader, such as the bulletin."""

    def follow(self, name: str, after: str = BEGINNING, leader: bool = True) -> AsyncIterator[StreamEvent]:
        """Yields events after a place as they come, and ends after the last one when the result is committed.

        Waits through outages of the service. Events beyond the stream's bound are lost to late readers.

        Args:
            leader: whether the stream has a leader, whose end is looked for.

        Raises:
            LeaderLostError: nobody computes it any more.
            MalformedValueError: there is no stream under its name, but something else.
        """

    async def commit(self, lease: Lease, pointer: str, bill: bytes) -> CommitOutcome:
        """Makes the result and its bill visible at once, if the lease's token is still the newest of its name.

        The same bill of a name is written once, also if the result was forgotten before it is committed anew.
        """

    async def result(self, name: str) -> CommittedResult | None:
        """Returns what is committed under a name."""

    async def forget(self, name: str, result: CommittedResult) -> bool:
        """Removes a result whose picture is gone, so that it can be computed anew. False if it has another result."""

    async def bills(self, after: str = BEGINNING, limit: int = 1000) -> list[StreamEvent]:
        """Returns bills after a place, oldest first."""

    async def read(self, name: str) -> list[StreamEvent]:
        """Returns the events that are in a stream now."""

    async def expire(self, name: str, ttl_s: float) -> None:
        """Deletes a stream after a time."""

    async def claim(self, name: str, value: bytes, ttl_s: float, instead_of: bytes | None = None) -> bytes:
        """Binds a name to a value unless it has one. Returns the value that counts.

        Args:
            ttl_s: how long the binding lasts, if this call makes it.
            instead_of: replace this value.
        """

    async def unclaim(self, name: str, value: bytes, ttl_s: float = 0.0) -> None:
        """Removes the binding of a name to this value, after `ttl_s`."""

    async def register(self, name: str) -> None:
        """Adds a name to the registry: someone should hold its lease until it is unregistered."""

    async def unregister(self, name: str) -> None:
        """Removes a name from the registry."""

    async def unowned(self) -> list[str]:
        """Returns registered names whose lease nobody holds."""

    async def close(self) -> None:
        """Ends all `follow` calls."""
