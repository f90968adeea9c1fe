"""The open client streams of this server: the generation that each watches, and how to end it with an error.

A stream that the server ends leaves its generation at once. Its call ends when its
client reads on, or when the connection ends; until then gRPC keeps the message that
the client has not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from safelight_server.domain.errors import SafelightError, UnavailableError
from safelight_server.generations.generation import Generation
from safelight_server.stream import Watcher

End = Callable[[SafelightError], None]
"""Ends a stream with an error."""


class OpenStreams:
    """The open streams, by watcher."""

    def __init__(self) -> None:
        self._open: dict[Watcher, tuple[Generation, End]] = {}
        self._untaken: dict[Watcher, tuple[str, int]] = {}
        self._stream_closed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, watcher: Watcher, generation: Generation, end: End) -> None:
        """Adds a stream; `end` ends its call with an error."""
        self._open[watcher] = (generation, end)

    def close(self, watcher: Watcher) -> Generation | None:
        """Removes a stream whose call ends, and returns its generation; None: the server has ended it before."""
        self._untaken.pop(watcher, None)
        return self._remove(watcher)[0]

    def _remove(self, watcher: Watcher) -> tuple[Generation | None, End | None]:
        generation, end = self._open.pop(watcher, (None, None))
        if generation is not None:
            watcher.close()
            self._stream_closed.set()
        return generation, end

    def stalled(self, now: float, stall_s: float) -> list[Watcher]:
        """The streams whose clients have read nothing for `stall_s`."""
        return [watcher for watcher in self._open if watcher.stalled_for(now) > stall_s]

    # --- what is not read ---

    def watched(self) -> Iterator[Generation]:
        """The generations of all streams."""
        return (generation for generation, _ in self._open.values())

    def late(self, now: float) -> dict[str, list[tuple[Watcher, Generation]]]:
        """The streams with unread events of ended generations, by tenant; the longest unread are last."""
        late: dict[str, list[tuple[Watcher, Generation]]] = {}
        for watcher in sorted(self._open, key=lambda watcher: watcher.stalled_for(now)):
            generation = self._open[watcher][0]
            if generation.ended and watcher.unread_bytes:
                late.setdefault(generation.caller.tenant, []).append((watcher, generation))
        return late

    def messages(self) -> Iterator[tuple[str, Watcher, int]]:
        """The messages that gRPC holds since no client has read them: tenant, stream and bytes of each."""
        for watcher, (generation, _) in self._open.items():
            yield generation.caller.tenant, watcher, watcher.unread_bytes
        for watcher, (tenant, num_bytes) in self._untaken.items():
            yield tenant, watcher, num_bytes

    # --- while the server drains, or a generation moves ---

    def not_owned(self) -> list[Generation]:
        """The generations that are watched here and owned by another replica."""
        return [generation for generation, _ in self._open.values() if not generation.owned]

    def undelivered(self) -> list[Generation]:
        """The generations that have ended and are still being sent."""
        return [generation for generation, _ in self._open.values() if generation.ended]

    async def delivered(self) -> None:
        """Waits until `undelivered` is empty."""
        while self.undelivered():
            self._stream_closed.clear()
            await self._stream_closed.wait()

    def move(self, generation: Generation) -> None:
        """Ends the streams of a generation with MOVED: another replica continues it."""
        error = UnavailableError(
            "another replica goes on with it; WatchGeneration finds it", reason="MOVED", retry_after_s=0.1
        )
        self.end_all(generation, error)

    def end_all(self, generation: Generation, error: SafelightError) -> None:
        """Ends the streams of a generation with an error."""
        for watcher, (watched, _) in list(self._open.items()):
            if watched is generation:
                self.end(watcher, error)

    def end(self, watcher: Watcher, error: SafelightError) -> Generation | None:
        """Ends a stream with an error, and returns its generation; None: it is not open."""
        num_bytes = watcher.unread_bytes
        generation, end = self._remove(watcher)
        if generation is not None and end is not None:
            if num_bytes:
                self._untaken[watcher] = generation.caller.tenant, num_bytes
            end(error)
        return generation
