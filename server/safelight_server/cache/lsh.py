"""Vectors at high cosine, found by their buckets: random hyperplanes, several tables, several probes.

Each table cuts space by random hyperplanes through the origin (Charikar 2002);
the signs make a bucket. A search looks into each table's own bucket and into
those across the nearest planes (query-directed probing, Lv et al. 2007), then
computes the exact cosine of every vector found. Buckets are plain strings, so
any store of sets serves: a dict here, Redis sets across replicas.

Invariants: what is returned has at least the cosine asked for, computed from
the stored vector, whatever the buckets say; planes are a function of the seed
alone; items, buckets and candidates are bounded. Neighbours: `embedding` makes
the vectors, `fingerprint` seeds and scopes, `guard` judges what is found.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from safelight_server.cache.embedding import cosines

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the tables. The defaults are measured: see docs/decisions/0009.

    Attributes:
        num_tables: more find more and cost memory.
        num_bits: planes a table; more make smaller buckets.
        num_probes: buckets looked into beside a table's own.
    """

    num_tables: int = 12
    num_bits: int = 20
    num_probes: int = 8


@dataclass(frozen=True, slots=True)
class Match:
    """Something found."""

    item: str
    cosine: float


class BucketStore(Protocol):
    """Sets of items by bucket, and the items' vectors. One round trip each."""

    async def add(self, item: str, buckets: Sequence[str], vector: bytes) -> None:
        """Puts an item into its buckets; an item that is there is replaced."""

    async def remove(self, item: str) -> None:
        """Takes an item out of everything; nothing happens where it is not there."""

    async def discard(self, goes: Callable[[str], bool]) -> bool:
        """Takes out all items for which `goes`; False where that could not be done."""

    async def members(self, buckets: Sequence[str], limit: int) -> Sequence[str]:
        """The union of the buckets (Redis: one SUNION), each item once, at most `limit`, of the first buckets first
        where the store can tell."""

    async def vectors(self, items: Sequence[str]) -> Sequence[bytes | None]:
        """The items' vectors, None where one has gone meanwhile (Redis: one MGET)."""


class Signatures:
    """The hyperplanes of one pipeline and tenant.

    Args:
        dimension: D of the vectors.
        seed: decides the planes; `fingerprint.derived_seed` makes it secret and different for every tenant.
    """

    def __init__(self, dimension: int, seed: int, shape: Shape = Shape()) -> None:
        self.shape = shape
        rng = np.random.Generator(np.random.Philox(key=seed))
        self._planes = rng.standard_normal((shape.num_tables * shape.num_bits, dimension), np.float32)
        self._weights = 1 << np.arange(shape.num_bits, dtype=np.int64)
        near = min(shape.num_bits, 8)
        subsets = [s for size in (1, 2) for s in itertools.combinations(range(near), size)]
        self._subsets = np.zeros((len(subsets), near), np.float32)
        for row, subset in enumerate(subsets):
            self._subsets[row, list(subset)] = 1

    def buckets(self, scope: str, vector: Floats) -> list[str]:
        """Where a vector (D,) is kept: one bucket a table."""
        return self._names(scope, self._codes(self._margins(vector))[:, None])

    def probes(self, scope: str, vector: Floats) -> list[str]:
        """Where vectors like this one may be: each table's own bucket first, then those across the nearest planes."""
        margins = self._margins(vector)
        codes = self._codes(margins)
        if not self.shape.num_probes:
            return self._names(scope, codes[:, None])
        near = self._subsets.shape[1]
        nearest = np.argsort(np.abs(margins), axis=1)[:, :near]
        distances = np.take_along_axis(margins, nearest, axis=1) ** 2 @ self._subsets.T
        chosen = np.argsort(distances, axis=1)[:, : self.shape.num_probes]
        flips = (self._subsets[chosen].astype(np.int64) * self._weights[nearest][:, None, :]).sum(axis=2)
        return self._names(scope, np.concatenate([codes[:, None], codes[:, None] ^ flips], axis=1))

    def _margins(self, vector: Floats) -> Floats:
        """(tables, bits): on which side of each plane, and how far."""
        margins = self._planes @ np.asarray(vector, np.float32)
        return margins.reshape(self.shape.num_tables, self.shape.num_bits)

    def _codes(self, margins: Floats) -> npt.NDArray[np.int64]:
        return (margins > 0) @ self._weights

    def _names(self, scope: str, codes: npt.NDArray[np.int64]) -> list[str]:
        """In the order probe by probe, so that the likeliest buckets of all tables come first."""
        return [f"{scope}:{table:x}:{code:x}" for column in codes.T.tolist() for table, code in enumerate(column)]


class SimilarIndex:
    """Searches one store by one tenant's planes.

    Args:
        max_candidates: vectors compared at most in a search.
    """

    def __init__(self, signatures: Signatures, store: BucketStore, *, max_candidates: int = 512) -> None:
        self._signatures = signatures
        self._store = store
        self._max_candidates = max_candidates

    async def add(self, scope: str, item: str, vector: Floats) -> None:
        """Keeps a unit vector (D,) as float16. `scope` is what must be equal: only searches with the same find it."""
        packed = np.asarray(vector, np.float16).tobytes()
        await self._store.add(item, self._signatures.buckets(scope, vector), packed)

    async def remove(self, item: str) -> None:
        """Forgets an item."""
        await self._store.remove(item)

    async def search(self, scope: str, vector: Floats, min_cosine: float, limit: int = 8) -> list[Match]:
        """The nearest that were found with at least `min_cosine`, nearest first."""
        found = await self._store.members(self._signatures.probes(scope, vector), self._max_candidates)
        packed = await self._store.vectors(found) if found else ()
        there = [(item, data) for item, data in zip(found, packed, strict=True) if data is not None]
        return matches([item for item, _ in there], (data for _, data in there), vector, min_cosine, limit)


def matches(
    items: Sequence[str], packed: Iterable[bytes], vector: Floats, min_cosine: float, limit: int
) -> list[Match]:
    """The exact check: of stored float16 vectors, those with at least `min_cosine`, nearest first."""
    if not items:
        return []
    stored = np.frombuffer(b"".join(packed), np.float16).reshape(len(items), -1)
    exact = cosines(stored, vector)
    good = np.flatnonzero(exact >= min_cosine)
    best = good[np.argsort(-exact[good], kind="stable")][:limit]
    return [Match(items[index], float(exact[index])) for index in best.tolist()]


class MemoryBuckets:
    """A `BucketStore` in this process.

    Args:
        max_items: beyond it the item that was added longest ago goes; adding one again renews it.
        max_members: a full bucket drops its oldest member; it stays in its other buckets.
    """

    def __init__(self, max_items: int, max_members: int = 64) -> None:
        self._max_items = max_items
        self._max_members = max_members
        self._buckets: dict[str, dict[str, None]] = {}
        self._items: OrderedDict[str, tuple[Sequence[str], bytes]] = OrderedDict()

    def __len__(self) -> int:
        """How many items are kept."""
        return len(self._items)

    @property
    def num_bytes(self) -> int:
        """Of the vectors, without what Python needs around them."""
        return sum(len(vector) for _, vector in self._items.values())

    async def add(self, item: str, buckets: Sequence[str], vector: bytes) -> None:
        """See `BucketStore`."""
        self._drop(item)
        while len(self._items) >= self._max_items:
            self._drop(next(iter(self._items)))
        self._items[item] = (buckets, vector)
        for bucket in buckets:
            members = self._buckets.setdefault(bucket, {})
            if len(members) >= self._max_members:
                del members[next(iter(members))]
            members[item] = None

    async def remove(self, item: str) -> None:
        """See `BucketStore`."""
        self._drop(item)

    async def discard(self, goes: Callable[[str], bool]) -> bool:
        """See `BucketStore`."""
        for item in [item for item in self._items if goes(item)]:
            self._drop(item)
        return True

    async def members(self, buckets: Sequence[str], limit: int) -> Sequence[str]:
        """See `BucketStore`; in the order of the buckets."""
        found: dict[str, None] = {}
        for bucket in buckets:
            if (members := self._buckets.get(bucket)) is not None:
                found.update(members)
                if len(found) >= limit:
                    break
        return list(itertools.islice(found, limit))

    async def vectors(self, items: Sequence[str]) -> Sequence[bytes | None]:
        """See `BucketStore`."""
        return [entry[1] if (entry := self._items.get(item)) else None for item in items]

    def _drop(self, item: str) -> None:
        buckets, _ = self._items.pop(item, ((), b""))
        for bucket in buckets:
            members = self._buckets.get(bucket, {})
            members.pop(item, None)
            if not members:
                self._buckets.pop(bucket, None)
