"""An event loop on a virtual clock: no I/O, no threads, no waiting.

Time stands still while anything can run, then jumps to the next timer. What
runs on behalf of a `Host` (a replica's process) carries it in its context:
callbacks of a frozen host are kept until it thaws, those of a dead one for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import operator
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar, copy_context
from heapq import heappop, heappush
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


class Callback(list[Any]):
    """What `call_soon`, `call_later` and `call_at` return: as `asyncio.TimerHandle`, at a fifth of its time.

    A list, as one is made without a call of Python: when it is due, its number among those that are due then, what is
    called (None: nothing any more), the arguments, the context. So timers are also in order among themselves.
    """

    __slots__ = ()

    def cancel(self) -> None:
        """It is not called."""
        self[2:4] = None, ()

    def cancelled(self) -> bool:
        """Whether it is not called any more."""
        return self[2] is None

    def when(self) -> float:
        """The time at which it is due."""
        return float(self[0])


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. Of two callbacks that are due at one time, the one that was scheduled first is called first."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = [0.0]
        self._due: deque[Callback] = deque()
        self._timers: list[Callback] = []
        self._num_timers = 0
        # What is asked a thousand times in a schedule costs no call of Python.
        self.time: Callable[[], float] = functools.partial(operator.getitem, self._clock, 0)  # type: ignore[method-assign]
        self.get_debug: Callable[[], bool] = bool  # type: ignore[method-assign]
        self.create_future = functools.partial(asyncio.Future, loop=self)  # type: ignore[method-assign]

    def freeze(self, host: Host) -> None:
        """As SIGSTOP."""
        host.held = host.held or []

    def thaw(self, host: Host) -> None:
        """As SIGCONT: what has become due meanwhile runs at once, late."""
        held, host.held = host.held, None
        self._due.extend(held or ())

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> Any:
        """See `asyncio.loop`."""
        handle = Callback((self._clock[0], 0, callback, args, copy_context() if context is None else context))
        self._due.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # there is one thread

    def call_later(self, delay: float, callback: Any, *args: Any, context: Context | None = None) -> Any:
        """See `asyncio.loop`."""
        self._num_timers = number = self._num_timers + 1
        when = self._clock[0] + delay
        handle = Callback((when, number, callback, args, copy_context() if context is None else context))
        heappush(self._timers, handle)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> Any:
        """See `asyncio.loop`."""
        self._num_timers = number = self._num_timers + 1
        handle = Callback((when, number, callback, args, copy_context() if context is None else context))
        heappush(self._timers, handle)
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
        """Runs until the loop is stopped: many turns, as each costs a call."""
        due, timers, clock = self._due, self._timers, self._clock
        while not self._stopping:
            if not due:
                while timers and timers[0][2] is None:
                    heappop(timers)
                if not timers:
                    raise StuckError
                clock[0] = max(clock[0], timers[0][0])
            now = clock[0]
            while timers and timers[0][0] <= now:
                due.append(heappop(timers))
            for _ in range(len(due)):
                handle = due.popleft()
                _, _, call, args, context = handle
                if call is None:
                    continue
                host = context.get(HOST)
                if host is not None and host.held is not None:
                    host.held.append(handle)
                    continue
                try:
                    context.run(call, *args)
                except Exception as error:  # noqa: BLE001  # as every event loop does
                    self.call_exception_handler({"message": f"Exception in callback {call}", "exception": error})

    def _asyncgen_firstiter_hook(self, agen: Any) -> None:
        pass  # the set of all generators is for a loop that is shut down in order

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
