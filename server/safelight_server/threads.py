"""Blocking work in threads, a bounded number of pieces at once, so that what a piece takes of memory is bounded too.

Where several wait, their subjects (tenants) take turns: nobody waits for all that
another has asked for.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


class FairTurns:
    """Turns of which a bounded number is taken at once.

    Args:
        at_once: the number.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # subjects, the next one first

    @asynccontextmanager
    async def turn(self, subject: str) -> AsyncIterator[None]:
        """Waits for a turn, and has it while the block runs."""
        await self.take(subject)
        try:
            yield
        finally:
            self.release()

    async def take(self, subject: str) -> None:
        """Waits for a turn. Whoever has it calls `release` once."""
        if self._free:
            self._free -= 1
            return
        ready = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(subject, deque()).append(ready)
        try:
            await ready
        except asyncio.CancelledError:
            if not ready.cancelled():  # the turn came together with the cancellation
                self.release()
            raise

    def release(self) -> None:
        """Gives a turn to one that waits, of the subject that has waited longest for one."""
        while self._waiting:
            subject, queue = self._waiting.popitem(last=False)
            while queue and (ready := queue.popleft()).done():
                pass  # it was cancelled
            if queue:
                self._waiting[subject] = queue
            if not ready.done():
                ready.set_result(None)
                return
        self._free += 1


class OneAtATime:
    """Runs work in a thread, while other work waits for its turn on the event loop, where it takes no thread.

    A thread cannot be stopped. So whoever is cancelled does not give up the turn of work that has begun: the next one
    begins when the thread is done.

    Args:
        pool: None: the threads of `asyncio.to_thread`.
    """

    def __init__(self, pool: Executor | None = None) -> None:
        self._pool = pool
        self._turns = FairTurns(1)

    async def run(self, subject: str, work: Callable[..., T], *arguments: object) -> T:
        """Calls `work` in a thread when it is the subject's turn. Raises what it raises."""
        await self._turns.take(subject)
        try:
            running = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        except BaseException:  # the pool is closed
            self._turns.release()
            raise
        running.add_done_callback(lambda _: self._turns.release())
        return await asyncio.shield(running)
