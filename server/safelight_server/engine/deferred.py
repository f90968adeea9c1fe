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
        self._untold: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._untold)

    def later(self, report: Callable[[], None]) -> None:
        """Keeps a report back; `tell` or `tell_soon` follows."""
        self._untold.append(report)

    def tell(self) -> None:
        """Tells what is kept back, now."""
        while self._untold:
            self._untold.popleft()()

    def tell_soon(self) -> None:
        """Tells what is kept back when calls have left."""
        if self._untold:
            self._after(TURNS)

    def _after(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._after, turns - 1)
        else:
            self.tell()
