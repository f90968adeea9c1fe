"""The disk tier: a local folder, bounded by bytes, that evicts the least recently used entries.

Each entry is one file. obstore writes it under a temporary name and renames it, so that a file is complete or absent.
A file that a power cut left incomplete fails authentication when it is opened. The order of use and the sizes are
kept in memory and rebuilt from the folder at start. A lock file reserves the folder for one process. Nothing is
unpickled. An unreadable or full disk raises an error; nothing is repaired here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from safelight_server.storage.base import (
    HEADER_BYTES,
    KEY,
    OnEvict,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StoreUsage,
    TooLargeError,
    check_key,
)

BLOCK_BYTES = 4096
LOCK = ".lock"
UNFINISHED = re.compile(KEY.pattern + r"#\d+")
"""Temporary names that obstore gives to files while it writes them."""
NO_ROOM = ("os error 28", "os error 122", "os error 27")  # ENOSPC, EDQUOT, EFBIG


class DiskStoreError(Exception):
    """The folder cannot be used. Raised at start only."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Converts obstore's errors to `StoreError`. Callers catch `FileNotFoundError` inside it."""
    try:
        yield
    except (BaseError, OSError) as error:
        first = str(error).splitlines()[0]
        if any(sign in str(error) for sign in NO_ROOM):
            raise StoreFullError(f"disk: {first}") from error
        raise StoreUnavailableError(f"disk: {first}") from error


class DiskStore:
    """A `Store` in a local folder. `open` creates it; `close` releases the folder.

    Args:
        max_bytes: most bytes that the files may occupy, each rounded up to blocks of `BLOCK_BYTES`.
        on_evict: called with each evicted entry; None: evicted files are deleted without being read.
    """

    name = "disk"

    def __init__(self, folder: Path, max_bytes: int, lock: int, on_evict: OnEvict | None = None) -> None:
        self.on_evict = on_evict
        self._files = LocalStore(folder)
        self._max_bytes = max_bytes
        self._lock = lock
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        self._changing = asyncio.Lock()
        self._writing: str | None = None

    @classmethod
    async def open(cls, folder: Path, max_bytes: int, on_evict: OnEvict | None = None) -> DiskStore:
        """Opens the store in a folder and creates the folder if it is missing.

        Raises:
            DiskStoreError: the folder cannot be written, or another process uses it.
        """
        store = cls(folder, max_bytes, await asyncio.to_thread(_claim, folder), on_evict)
        found = [item for batch in obstore.list(store._files) for item in batch if KEY.fullmatch(item["path"])]
        for item in sorted(found, key=lambda item: item["last_modified"]):
            store._count(item["path"], item["size"])
        await store._make_room()
        return store

    async def get(self, key: str) -> bytes | None:
        """Returns the value, or None, and marks the key as the most recently used."""
        if key not in self._sizes:
            return None
        self._sizes.move_to_end(key)
        return await self._read(key)

    async def head(self, key: str) -> bytes | None:
        """Returns the first `HEADER_BYTES` of the value, or None."""
        if key not in self._sizes:
            return None
        with translated():
            try:
                return bytes(await obstore.get_range_async(self._files, key, start=0, length=HEADER_BYTES))
            except FileNotFoundError:
                return None

    async def _read(self, key: str) -> bytes | None:
        with translated():
            try:
                result = await obstore.get_async(self._files, key)
                return bytes(await result.bytes_async())
            except FileNotFoundError:
                if key != self._writing:  # else `_put` has counted the file and is about to write it
                    self._forget(key)
                return None

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Evicts entries until the value fits, then writes it."""
        check_key(key)
        if _blocks(len(value)) > self._max_bytes:
            raise TooLargeError(f"{len(value)} bytes are more than the disk may hold")
        await _finished(self._put(key, value))

    async def _put(self, key: str, value: bytes) -> None:
        async with self._changing:
            self._count(key, len(value))
            self._writing = key
            try:
                await self._make_room()
                with translated():
                    await obstore.put_async(self._files, key, value, use_multipart=False)
            except StoreError:
                with contextlib.suppress(StoreError):  # removes an older file; if that fails, it stays counted
                    await self._remove(key)
                raise
            finally:
                self._writing = None

    async def delete(self, key: str) -> None:
        """Removes a file."""
        await _finished(self._delete(key))

    async def _delete(self, key: str) -> None:
        async with self._changing:
            await self._remove(key)

    async def _remove(self, key: str) -> None:
        with translated(), contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(self._files, key)
        self._forget(key)

    async def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """Lists the keys that begin with `prefix`."""
        for key in list(self._sizes):
            if key.startswith(prefix) and key in self._sizes:
                yield key

    async def usage(self) -> StoreUsage:
        """Returns the number of files and their size in whole blocks."""
        return StoreUsage(len(self._sizes), self._bytes)

    async def close(self) -> None:
        """Releases the lock on the folder. The files stay."""
        os.close(self._lock)

    def _count(self, key: str, size: int) -> None:
        self._forget(key)
        self._sizes[key] = _blocks(size)
        self._bytes += _blocks(size)

    def _forget(self, key: str) -> None:
        self._bytes -= self._sizes.pop(key, 0)

    async def _make_room(self) -> None:
        while self._bytes > self._max_bytes:
            oldest = next(iter(self._sizes))
            value = None
            if self.on_evict is not None:
                with contextlib.suppress(StoreError):
                    value = await self._read(oldest)
            await self._remove(oldest)
            if value is not None and self.on_evict is not None:
                self.on_evict(oldest, value)


async def _finished(change: Coroutine[None, None, None]) -> None:
    """Runs a change to its end, even if the caller is cancelled."""
    # obstore's threads finish what they have begun. If the sizes were left half updated, a file could stay uncounted.
    task = asyncio.create_task(change)
    # The error is retrieved so that asyncio does not log it; a caller that still waits gets it from `shield`.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.shield(task)


def _blocks(size: int) -> int:
    return -(-max(size, 1) // BLOCK_BYTES) * BLOCK_BYTES


def _claim(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskStoreError(f"{folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise DiskStoreError(f"{folder} is in use by another process; give each server a folder of its own") from None
    for unfinished in folder.rglob("*#*"):
        if UNFINISHED.fullmatch(unfinished.relative_to(folder).as_posix()):
            unfinished.unlink(missing_ok=True)
    return lock
