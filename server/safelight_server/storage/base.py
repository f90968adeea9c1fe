"""What a tier is: bytes by key, bounded, with a time to live.

Keys are `TENANT/KIND/DIGEST`, each part lower-case letters, digits, dots and
dashes, the first a letter or digit; names of tenants and contents never stand in them, only HMACs
(`keyring.py`). Values are opaque here; `sealed.py` makes them and puts
`HEADER_BYTES` in the clear at their beginning, which `head` reads without the
rest.

A key's value never changes its meaning: whoever computes it again puts the same
bytes or ones that serve as well. So a tier may hold an older value than another
(the few keys for which that matters are read `fresh`, see `tiers.py`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

HEADER_BYTES = 48
STALL_S = 5.0
"""A listing that gives nothing for this long has failed."""
KEY = re.compile(r"[a-z0-9][a-z0-9.-]*(/[a-z0-9][a-z0-9.-]*){2}")


class StoreError(Exception):
    """A tier could not do what was asked. Never shown to a client: the tier is skipped."""


class StoreUnavailableError(StoreError):
    """The tier does not answer, answers too late, or is given a rest by its breaker."""


class LeftAloneError(StoreUnavailableError):
    """The tier was not even asked, because it failed just now."""


class StoreFullError(StoreError):
    """The tier works, but has no room for the value."""


class TooLargeError(StoreError):
    """The tier could never hold the value."""


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """What a tier holds."""

    entries: int
    num_bytes: int


OnEvict = Callable[[str, bytes], None]
"""Told the key and value of an entry that was pushed out to make room; not of deleted or expired ones."""


class Store(Protocol):
    """One tier. All methods raise `StoreError` and nothing else, and may be cancelled at any time."""

    @property
    def name(self) -> str:
        """The tier in metrics and logs."""

    async def get(self, key: str) -> bytes | None:
        """The value, None where there is none."""

    async def head(self, key: str) -> bytes | None:
        """The first `HEADER_BYTES` of the value, None where there is none. Does not count as use."""

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keeps a value, at least as long as there is room and at most `ttl_s` where the tier can forget by time.

        Raises:
            StoreFullError: there is no room.
            TooLargeError: there can never be for this value.
        """

    async def delete(self, key: str) -> None:
        """Forgets a key, whether it was there or not."""

    def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """All keys that begin with `prefix`, in no order; those put or deleted meanwhile may be missing or there."""

    async def usage(self) -> StoreUsage:
        """What the tier holds now."""

    async def close(self) -> None:
        """Lets go of connections. Entries of persistent tiers stay."""


async def listed(store: Store, prefix: str) -> AsyncGenerator[str]:
    """All keys that begin with `prefix`. How long it takes depends on all that the store holds: no breaker times it.

    Raises:
        StoreUnavailableError: the store fails or stalls.
    """
    keys = aiter(store.keys(prefix))
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                key = await anext(keys)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise StoreUnavailableError(f"{store.name}: it lists nothing for {STALL_S} s") from None
        yield key


def check_key(key: str) -> str:
    """The key itself.

    Raises:
        ValueError: it is not made as keys are.
    """
    if not KEY.fullmatch(key):
        raise ValueError(f"not a key of the cache: {key!r}")
    return key
