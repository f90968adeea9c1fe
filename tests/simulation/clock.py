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
from collections.abc import Iterator
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
        self.held: list[asyncio.Handle] | None = None
        self.context = copy_context()
        self.context.run(HOST.set, self)


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        """Seconds since the schedule began."""
        return self._now

    def freeze(self, host: Host) -> None:
        """As SIGSTOP."""
        host.held = host.held or []

    def thaw(self, host: Host) -> None:
        """As SIGCONT: what has become due meanwhile runs at once, late."""
        held, host.held = host.held, None
        self._ready.extend(held or ())  # type: ignore[attr-defined]  # of BaseEventLoop

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]  # of BaseEventLoop
        if not ready:
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)._scheduled = False
            if not scheduled:
                raise StuckError
            self._now = max(self._now, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            host = handle._context.get(HOST)
            if host is not None and host.held is not None:
                host.held.append(handle)
                continue
            handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

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
