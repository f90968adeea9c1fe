"""The interface of one storage tier: a bounded key-value store of bytes with a time to live.

A key is `TENANT/KIND/DIGEST`. Each part consists of lower-case letters, digits, dots and dashes and begins with a
letter or digit. Keys hold HMACs (`keyring.py`), never names of tenants or prompts. A tier does not interpret values:
`sealed.py` encrypts them and puts a header of `HEADER_BYTES` in plain text before each, which `head` reads alone.

Two values of one key are interchangeable, since a key names what the value was computed from. A tier may therefore
hold an older value than another tier. The few keys for which that matters are read with `fresh=True` (`tiers.py`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

HEADER_BYTES = 48
STALL_S = 5.0
"""Seconds without a new key after which a listing counts as failed."""
KEY = re.compile(r"[a-z0-9][a-z0-9.-]*(/[a-z0-9][a-z0-9.-]*){2}")


class StoreError(Exception):
    """An operation of a tier failed. Clients never see this: the tier is skipped."""


class StoreUnavailableError(StoreError):
    """The tier does not answer, answers too late, or its breaker is open."""


class LeftAloneError(StoreUnavailableError):
    """The breaker is open: the tier failed a moment ago and was not called."""


class StoreFullError(StoreError):
    """The tier works, but has no room for the value now."""


class MalformedValueError(StoreError):
    """The tier works, but has something under the key that no server has put there."""


class TooLargeError(StoreError):
    """The value is larger than the whole tier."""


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Number and size of the entries in a tier."""

    entries: int
    num_bytes: int


OnEvict = Callable[[str, bytes], None]
"""Called with the key and value of an entry evicted to make room. Not called for deleted or expired entries."""


class Store(Protocol):
    """One tier. Methods raise only `StoreError` and can be cancelled at any time."""

    @property
    def name(self) -> str:
        """Name of the tier in metrics and logs."""

    async def get(self, key: str) -> bytes | None:
        """Returns the value, or None if the key is absent."""

    async def head(self, key: str) -> bytes | None:
        """Returns the first `HEADER_BYTES` of the value, or None if the key is absent. Does not count as a use."""

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Stores a value until it is evicted or, in tiers that expire entries, for `ttl_s` seconds.

        Raises:
            StoreFullError: there is no room now.
            TooLargeError: the value is larger than the whole tier.
        """

    async def delete(self, key: str) -> None:
        """Deletes a key. An absent key is no error."""

    def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """Lists the keys that begin with `prefix`, in no order.

        Keys added or deleted during the listing may or may not appear.
        """

    async def usage(self) -> StoreUsage:
        """Returns the number and size of the entries now."""

    async def close(self) -> None:
        """Closes connections. Persistent tiers keep their entries."""


async def listed(store: Store, prefix: str) -> AsyncGenerator[str]:
    """Lists the keys that begin with `prefix`.

    The duration grows with the store, so the breaker's timeout does not apply; `STALL_S` does.

    Raises:
        StoreUnavailableError: the store failed, or gave no key for `STALL_S` seconds.
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
    """Returns the key if it is well-formed.

    Raises:
        ValueError: the key does not match `KEY`.
    """
    if not KEY.fullmatch(key):
        raise ValueError(f"not a key of the cache: {key!r}")
    return key
