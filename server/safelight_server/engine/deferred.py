"""Callbacks that wait until the runtime calls that were just dispatched have left this process.

The engine's reports serialize events and copy latents, which must not delay a call.
Invariant: callbacks run in order, and once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

TURNS = 3
"""Iterations of the event loop after which a call that was just dispatched has left this process.
The batch's task starts in the first iteration, Triton's call is a task of its own and starts in the second, and grpc
writes in the third. Measured with 300 kB to a server on loopback, the loop blocked for 8 ms after so many iterations,
150 calls each: with 2 the request arrived 8.8 ms after its dispatch (all late), with 3 after 0.64 ms, with 4 after
0.68 ms.
"""


class DeferredCallbacks:
    """A queue of callbacks, which must not block or raise."""

    def __init__(self) -> None:
        self._callbacks: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._callbacks)

    def defer(self, callback: Callable[[], None]) -> None:
        """Adds a callback; `run` or `run_soon` follows."""
        self._callbacks.append(callback)

    def run(self) -> None:
        """Runs all callbacks now."""
        while self._callbacks:
            self._callbacks.popleft()()

    def run_soon(self) -> None:
        """Runs all callbacks when the calls that were just dispatched have left this process."""
        if self._callbacks:
            self._after(TURNS)

    def _after(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._after, turns - 1)
        else:
            self.run()
