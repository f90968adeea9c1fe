"""An event loop on a virtual clock: no I/O, no threads, no waiting.

Time stands still while anything can run, then jumps to the next timer. What
runs on behalf of a `Host` (a replica's process) carries it in its context:
callbacks of a frozen host are kept until it thaws, those of a dead one for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any

HOST: ContextVar[Host | None] = ContextVar("simulated_host", default=None)
EPOCH_S = 1_800_000_000.0
SERVICE = Context()
"""What runs for no host: it is never frozen."""


class StuckError(Exception):
    """Nothing can ever happen again and the schedule is not over."""


class Host:
    """The process of a replica: its callbacks run, or are held while it is frozen or dead.

    Args:
        skew_s: how far the clock of its machine is ahead.
    """

    def __init__(self, name: str, skew_s: float = 0.0) -> None:
        self.name = name
        self.skew_s = skew_s
        self.dead = False
        self.held: list[Callback] | None = None
        self.context = copy_context()
        self.context.run(HOST.set, self)


class Callback:
    """What `call_soon`, `call_later` and `call_at` return: as `asyncio.TimerHandle`, at a third of its time."""

    __slots__ = ("args", "call", "context", "when_s")

    def __init__(self, call: Callable[..., object], args: tuple[Any, ...], context: Context, when_s: float) -> None:
        self.call: Callable[..., object] | None = call
        self.args = args
        self.context = context
        self.when_s = when_s

    def cancel(self) -> None:
        """It is not called."""
        self.call, self.args = None, ()

    def cancelled(self) -> bool:
        """Whether it is not called any more."""
        return self.call is None

    def when(self) -> float:
        """The time at which it is due."""
        return self.when_s


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. Of two callbacks that are due at one time, the one that was scheduled first is called first."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._due: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Callback]] = []
        self._num_timers = 0

    def time(self) -> float:
        """Seconds since the schedule began."""
        return self._now

    def freeze(self, host: Host) -> None:
        """As SIGSTOP."""
        host.held = host.held or []

    def thaw(self, host: Host) -> None:
        """As SIGCONT: what has become due meanwhile runs at once, late."""
        held, host.held = host.held, None
        self._due.extend(held or ())

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> Any:
        """See `asyncio.loop`."""
        handle = Callback(callback, args, copy_context() if context is None else context, self._now)
        self._due.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # there is one thread

    def call_later(self, delay: float, callback: Any, *args: Any, context: Context | None = None) -> Any:
        """See `asyncio.loop`."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> Any:
        """See `asyncio.loop`."""
        handle = Callback(callback, args, copy_context() if context is None else context, when)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, handle))
        return handle

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> Any:
        """See `asyncio.loop`."""
        task: Any = asyncio.Task(coro, loop=self, name=name, context=context)  # type: ignore[arg-type]
        task._log_destroy_pending = False  # at the end of a schedule all tasks are dropped as they are
        return task

    def forget_all(self) -> None:
        """Drops what still waits without calling it."""
        self._due.clear()
        self._timers.clear()

    def _run_once(self) -> None:
        due, timers = self._due, self._timers
        if not due:
            while timers and timers[0][2].call is None:
                heapq.heappop(timers)
            if not timers:
                raise StuckError
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            due.append(heapq.heappop(timers)[2])
        for _ in range(len(due)):
            handle = due.popleft()
            if handle.call is None:
                continue
            host = handle.context.get(HOST)
            if host is not None and host.held is not None:
                host.held.append(handle)
                continue
            try:
                handle.context.run(handle.call, *handle.args)
            except Exception as error:  # noqa: BLE001  # as every event loop does
                self.call_exception_handler({"message": f"Exception in callback {handle.call}", "exception": error})

    def _check_closed(self) -> None:
        pass  # what is dropped at the end of a schedule may still try to cancel its timers

    def __del__(self, _warn: Any = None) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


@contextlib.contextmanager
def virtual_time(loop: VirtualLoop, seed: int) -> Iterator[None]:
    """Clocks follow the loop, and all chance follows the seed, while the block runs."""
    chance = random.Random(seed)
    before = time.monotonic, time.time, secrets.token_hex
    state = random.getstate()
    random.seed(seed)
    time.monotonic = loop.time
    time.time = lambda: EPOCH_S + loop.time() + (0.0 if (host := HOST.get()) is None else host.skew_s)
    secrets.token_hex = lambda nbytes=None: chance.randbytes(nbytes or 32).hex()
    try:
        yield
    finally:
        time.monotonic, time.time, secrets.token_hex = before
        random.setstate(state)
