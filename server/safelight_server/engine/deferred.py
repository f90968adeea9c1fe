"""What the engine has to tell, kept back until the calls that it has just dispatched have left.

Telling encodes events and copies latents: work that must not delay a call.
Invariant: what is told is told in order, and once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

TURNS = 3
"""Turns of the event loop in which a call that was just dispatched has left this process."""


class DeferredCallbacks:
    """See the module. Reports must not block or raise."""

    def __init__(self) -> None:
        self._callbacks: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._callbacks)

    def defer(self, callback: Callable[[], None]) -> None:
        """Keeps a report back; `run` or `run_soon` follows."""
        self._callbacks.append(callback)

    def run(self) -> None:
        """Tells what is kept back, now."""
        while self._callbacks:
            self._callbacks.popleft()()

    def run_soon(self) -> None:
        """Tells what is kept back when calls have left."""
        if self._callbacks:
            self._after(TURNS)

    def _after(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._after, turns - 1)
        else:
            self.run()
