"""What goes when bytes are short: least recently used, or least benefit (LCBFU).

Both keep books on keys, sizes and benefits only; the bytes themselves are the
store's. Least benefit is NIRVANA's least-computationally-beneficial and
frequently used (Agarwal et al. 2024, arXiv 2312.04429, section 5.4): the
computation that an entry saves at a hit times how often it was hit. Invariant:
what is kept never exceeds the bound; an entry larger than the bound is refused.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol


class Eviction(Protocol):
    """The books of a bounded store."""

    num_bytes: int
    """Kept now."""

    def add(self, key: str, num_bytes: int, benefit: float) -> list[str]:
        """Takes an entry in, or in again with another size; returns what has to go for it, maybe the entry itself.

        Args:
            key: of the entry.
            num_bytes: its size.
            benefit: what one hit saves: steps, or seconds.
        """

    def hit(self, key: str) -> None:
        """The entry was used."""

    def remove(self, key: str) -> None:
        """The entry is gone for another reason."""

    def __contains__(self, key: str) -> bool:
        """Whether it is kept."""

    def __len__(self) -> int:
        """How many are kept."""


class LeastRecentlyUsed:
    """Drops what was not used for longest."""

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
    """Drops the lowest benefit x uses per byte; of equals the one that was scored longest ago.

    A fresh entry counts as used once, else nothing new could ever stay. With
    `ageing`, an entry's score starts from that of what was dropped last
    (GreedyDual, Cherkasova 1998), so that what was once popular does not stay
    for ever.
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
        """Puts the entry's present score on the heap; older ones of it are skipped when they come up."""
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
