"""The open client streams of this server: the generation that each watches, and how to end it with an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from safelight_server.domain.errors import SafelightError, UnavailableError
from safelight_server.generations.generation import Generation
from safelight_server.stream import Watcher

End = Callable[[SafelightError], None]
"""Ends a stream with an error."""


class OpenStreams:
    """The open streams, by watcher."""

    def __init__(self) -> None:
        self._open: dict[Watcher, tuple[Generation, End]] = {}
        self._one_closed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, watcher: Watcher, generation: Generation, end: End) -> None:
        """Adds a stream; `end` ends its call with an error."""
        self._open[watcher] = (generation, end)

    def close(self, watcher: Watcher) -> bool:
        """Closes a stream and removes it; False: it was closed before."""
        if self._open.pop(watcher, None) is None:
            return False
        watcher.close()
        self._one_closed.set()
        return True

    def stalled(self, now: float, stall_s: float) -> list[tuple[Watcher, Generation, End]]:
        """The streams whose clients have taken nothing for `stall_s`."""
        return [(w, generation, end) for w, (generation, end) in self._open.items() if w.stalled_for(now) > stall_s]

    def not_owned(self) -> list[Generation]:
        """The generations that are watched here and owned by another replica."""
        return [generation for generation, _ in self._open.values() if not generation.owned]

    def undelivered(self) -> list[Generation]:
        """The generations that have ended and are still being sent."""
        return [generation for generation, _ in self._open.values() if generation.ended]

    async def delivered(self) -> None:
        """Waits until `undelivered` is empty."""
        while self.undelivered():
            self._one_closed.clear()
            await self._one_closed.wait()

    def move(self, generation: Generation) -> None:
        """Ends the streams of a generation with MOVED: another replica goes on with it."""
        error = UnavailableError(
            "another replica goes on with it; WatchGeneration finds it", reason="MOVED", retry_after_s=0.1
        )
        self.end(generation, error)

    def end(self, generation: Generation, error: SafelightError) -> None:
        """Ends the streams of a generation with an error."""
        for watcher, (watched, end) in list(self._open.items()):
            if watched is generation:
                self.close(watcher)
                end(error)
