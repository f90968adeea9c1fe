"""Generations that have ended, kept to be watched again for a while: bounded in time, number and bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection

from safelight_server.generations.generation import Generation


class FinishedGenerations:
    """Ended generations by id, the one that ended first to go first.

    Args:
        ttl_s: how long they are kept.
        clock: theirs.
    """

    def __init__(self, ttl_s: float, max_entries: int, max_bytes: int, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept: OrderedDict[str, Generation] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._kept

    def values(self) -> Collection[Generation]:
        """All of them."""
        return self._kept.values()

    def get(self, identifier: str) -> Generation | None:
        """The generation of that id, if it is kept."""
        return self._kept.get(identifier)

    def add(self, generation: Generation) -> None:
        """Keeps one that has just ended; one that is kept already stays as it is."""
        if generation.identifier not in self._kept:
            self._kept[generation.identifier] = generation
            self._bytes += generation.log.artifact_bytes
        self.trim()

    def remove(self, generation: Generation) -> None:
        """Forgets one: another replica knows better what it came to."""
        if self._kept.get(generation.identifier) is generation:
            del self._kept[generation.identifier]
            self._bytes -= generation.log.artifact_bytes

    def trim(self) -> None:
        """Forgets what is too old, and the oldest that nobody watches while there is too much."""
        now = self._clock()
        gone: list[Generation] = []
        for generation in self._kept.values():
            assert generation.times.ended is not None
            too_old = now - generation.times.ended > self._ttl_s
            too_many = len(self._kept) - len(gone) > self._max_entries
            if not (too_old or too_many or self._bytes > self._max_bytes):
                break
            if too_old or not generation.log.watchers:
                gone.append(generation)
                self._bytes -= generation.log.artifact_bytes
        for generation in gone:
            del self._kept[generation.identifier]
