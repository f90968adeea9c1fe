"""Keeps ended generations for a while, to be read and watched again; bounded in time, number and bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection

from safelight_server.generations.generation import Generation


class FinishedGenerations:
    """Ended generations by id; the one that ended first is dropped first.

    Args:
        ttl_s: how long a generation is kept after its end.
        max_entries: bound on their number.
        max_bytes: bound on the bytes of their pictures.
        clock: monotonic seconds.
    """

    def __init__(self, ttl_s: float, max_entries: int, max_bytes: int, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._clock = clock
        self._generations: OrderedDict[str, Generation] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._generations)

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._generations

    def values(self) -> Collection[Generation]:
        """All generations that are kept."""
        return self._generations.values()

    def get(self, identifier: str) -> Generation | None:
        """The generation of an id; None: it is not kept."""
        return self._generations.get(identifier)

    def add(self, generation: Generation) -> None:
        """Keeps a generation that has ended. One that is kept already stays where it is in the order."""
        if generation.identifier not in self._generations:
            self._generations[generation.identifier] = generation
            self._bytes += generation.log.artifact_bytes
        self.trim()

    def remove(self, generation: Generation) -> None:
        """Forgets one: another replica knows better what it came to."""
        if self._generations.get(generation.identifier) is generation:
            del self._generations[generation.identifier]
            self._bytes -= generation.log.artifact_bytes

    def trim(self) -> None:
        """Drops generations older than `ttl_s`, and the oldest without streams while the bounds are exceeded."""
        now = self._clock()
        gone: list[Generation] = []
        for generation in self._generations.values():
            assert generation.times.ended is not None
            too_old = now - generation.times.ended > self._ttl_s
            too_many = len(self._generations) - len(gone) > self._max_entries
            if not (too_old or too_many or self._bytes > self._max_bytes):
                break
            if too_old or not generation.log.watchers:
                gone.append(generation)
                self._bytes -= generation.log.artifact_bytes
        for generation in gone:
            del self._generations[generation.identifier]
