"""Eviction policies for a bounded cache: least recently used, or least benefit (LCBFU).

A policy tracks keys, sizes and benefits; the cache itself holds the bytes. Least benefit is NIRVANA's
least-computationally-beneficial and frequently used (Agarwal et al. 2024, arXiv 2312.04429, section 5.4): the
computation that a hit saves times the number of hits. Invariant: the tracked bytes never exceed the bound; an entry
larger than the bound is refused.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol


class Eviction(Protocol):
    """An eviction policy and the sizes that it tracks."""

    num_bytes: int
    """Total size of the tracked entries."""

    def add(self, key: str, num_bytes: int, benefit: float) -> list[str]:
        """Adds an entry, or replaces it.

        Args:
            key: of the entry.
            num_bytes: its size.
            benefit: what one hit saves, in steps or seconds.

        Returns:
            The keys to evict; the entry's own key if it is larger than the bound.
        """

    def hit(self, key: str) -> None:
        """Records a use of the entry."""

    def remove(self, key: str) -> None:
        """Removes an entry that is gone for another reason."""

    def __contains__(self, key: str) -> bool:
        """Whether the entry is tracked."""

    def __len__(self) -> int:
        """Number of tracked entries."""


class LeastRecentlyUsed:
    """Evicts the entry whose last use is longest ago."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def add(self, key: str, num_bytes: int, benefit: float) -> list[str]:
        self.remove(key)
        if num_bytes > self.max_bytes:
            return [key]
        gone = []
        while self.num_bytes + num_bytes > self.max_bytes:
            oldest = next(iter(self._sizes))
            self.remove(oldest)
            gone.append(oldest)
        self._sizes[key] = num_bytes
        self.num_bytes += num_bytes
        return gone

    def hit(self, key: str) -> None:
        if key in self._sizes:
            self._sizes.move_to_end(key)

    def remove(self, key: str) -> None:
        self.num_bytes -= self._sizes.pop(key, 0)

    def __contains__(self, key: str) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)


@dataclass(slots=True)
class _ScoredEntry:
    num_bytes: int
    benefit: float
    uses: int
    score: float
    order: int


class LeastBenefit:
    """Evicts the entry with the lowest benefit x uses per byte; of equal ones, that which was scored longest ago.

    A new entry counts as used once, since otherwise no new entry could stay. With `ageing`, the score of the last
    evicted entry is added to each new score (GreedyDual, Cherkasova 1998), so that entries which are no longer popular
    are evicted in the end.
    """

    def __init__(self, max_bytes: int, *, ageing: bool = True) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._ageing = ageing
        self._floor = 0.0
        self._clock = 0
        self._entries: dict[str, _ScoredEntry] = {}
        self._heap: list[tuple[float, int, str]] = []

    def add(self, key: str, num_bytes: int, benefit: float) -> list[str]:
        before = self._entries.get(key)
        self.remove(key)
        if num_bytes > self.max_bytes:
            return [key]
        gone = []
        while self.num_bytes + num_bytes > self.max_bytes:
            gone.append(self._drop())
        self._entries[key] = _ScoredEntry(num_bytes, benefit, before.uses if before else 1, 0.0, 0)
        self.num_bytes += num_bytes
        self._score(key)
        return gone

    def hit(self, key: str) -> None:
        if (entry := self._entries.get(key)) is not None:
            entry.uses += 1
            self._score(key)

    def remove(self, key: str) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self.num_bytes -= entry.num_bytes

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _score(self, key: str) -> None:
        """Pushes the entry's current score on the heap. Its older heap items are skipped when they are popped."""
        entry = self._entries[key]
        self._clock += 1
        entry.order = self._clock
        entry.score = self._floor + entry.benefit * entry.uses / max(1, entry.num_bytes)
        heapq.heappush(self._heap, (entry.score, entry.order, key))
        if len(self._heap) > 4 * len(self._entries) + 16:
            self._heap = [(kept.score, kept.order, name) for name, kept in self._entries.items()]
            heapq.heapify(self._heap)

    def _drop(self) -> str:
        while True:
            score, order, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is not None and entry.order == order:
                if self._ageing:
                    self._floor = score
                self.remove(key)
                return key
