"""A bounded background queue of writes to one tier, in order.

`get` also finds values that still wait in the queue, so that a value on its way from one tier to another is never
missing. A newer value of a key replaces the older one in the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

import structlog

log = structlog.get_logger(__name__)


class Mover:
    """A queue of values and the task that writes them. The first value starts the task.

    Args:
        write: writes a value. An exception is logged, and the value is lost.
        max_bytes: of the values that wait; `offer` refuses more.
    """

    def __init__(self, write: Callable[[str, bytes], Awaitable[object]], max_bytes: int) -> None:
        self._write = write
        self._max_bytes = max_bytes
        self._waiting: dict[str, bytes] = {}
        self._bytes = 0
        self._writing: tuple[str, bytes] | None = None
        self._offered = asyncio.Event()
        self._written = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def offer(self, key: str, value: bytes) -> bool:
        """Queues a value to be written. False if there is no room or the mover is closed."""
        if self._closed:
            return False
        before = len(self._waiting.get(key, b""))
        if self._bytes + len(value) - before > self._max_bytes:
            self.discard(key)
            return False
        self._waiting[key] = value
        self._bytes += len(value) - before
        self._offered.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="cache mover")
        return True

    def get(self, key: str) -> bytes | None:
        """Returns the value of a key that waits or is being written, or None."""
        value = self._waiting.get(key)
        if value is None and self._writing is not None and self._writing[0] == key:
            value = self._writing[1]
        return value

    def items(self) -> Iterator[tuple[str, bytes]]:
        """Lists the keys and values that wait or are being written now."""
        if self._writing is not None:
            yield self._writing
        yield from list(self._waiting.items())

    def discard(self, key: str) -> None:
        """Removes a waiting value. A write that has begun goes on; `settle` waits for it."""
        self._bytes -= len(self._waiting.pop(key, b""))

    async def settle(self, key: str) -> None:
        """Waits until no write of this key is in progress."""
        async with self._written:
            await self._written.wait_for(lambda: self._writing is None or self._writing[0] != key)

    async def flush(self) -> None:
        """Waits until the queue is empty and nothing is being written."""
        async with self._written:
            await self._written.wait_for(lambda: self._writing is None and not self._waiting)

    async def close(self) -> None:
        """Stops the task. Waiting values are lost unless `flush` was awaited before; later offers are refused."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            while self._waiting:
                key = next(iter(self._waiting))
                self._writing = (key, self._waiting[key])
                self.discard(key)
                try:
                    await self._write(*self._writing)
                except Exception:  # whatever is wrong with one value, the others are written
                    log.exception("bug", key=key)
                finally:
                    self._writing = None
                    async with self._written:
                        self._written.notify_all()
            self._offered.clear()
            await self._offered.wait()
