"""Locality-sensitive hashing (LSH) for nearest-neighbour search at high cosine: random hyperplanes, multi-probe.

Each table divides space by random hyperplanes through the origin (Charikar 2002); the signs of a vector select its
bucket. A search reads the vector's own bucket in each table and the buckets across the nearest hyperplanes
(query-directed probing, Lv et al. 2007), then computes the exact cosine of every vector found. Bucket names are plain
strings, so any store of sets will do: a dict in one process, Redis sets across replicas.

Invariants: every match has at least the requested cosine, computed from the stored vector. The hyperplanes depend on
the seed alone. Items, buckets and candidates are bounded.
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from safelight_server.cache.approximate.embedding import cosines

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
ROW = "I"
"""Type code of a row number, for numpy and for `array`."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the LSH tables. The defaults are measured: see docs/decisions/0009.

    Attributes:
        num_tables: more tables find more neighbours and cost more memory.
        num_bits: hyperplanes per table; more make smaller buckets.
        num_probes: buckets read per table beside the vector's own.
    """

    num_tables: int = 12
    num_bits: int = 24
    num_probes: int = 8


@dataclass(frozen=True, slots=True)
class Match:
    """A found item and its exact cosine."""

    item: str
    cosine: float


class BucketStore(Protocol):
    """A store of the items of each bucket and of the items' vectors."""

    async def add(self, item: str, buckets: Sequence[str], vector: Halves) -> None:
        """Puts an item with its vector (D,) into its buckets, or replaces it."""

    async def remove(self, item: str) -> None:
        """Removes an item and its vector. An absent item is no error."""

    async def discard(self, goes: Callable[[str], bool]) -> bool:
        """Removes all items for which `goes` returns true. False if the store failed."""

    async def find(self, buckets: Sequence[str], limit: int, dimension: int) -> tuple[Sequence[str], Halves]:
        """Returns at most `limit` items of the buckets, each once, and their vectors (N, `dimension`).

        A store that can keep order returns the items of the first buckets first.
        """


class Signatures:
    """The hyperplanes of one pipeline and tenant.

    Args:
        dimension: D of the vectors.
        seed: of the hyperplanes; `fingerprint.derived_seed` makes it secret and different for each tenant.
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
        """Returns the buckets that store a vector (D,): one per table."""
        return self._names(scope, self._codes(self._margins(vector))[:, None])

    def probes(self, scope: str, vector: Floats) -> list[str]:
        """Returns the buckets to search: the vector's own in each table first, then those across the nearest planes."""
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
        """Returns the vector's products with the hyperplanes' normals, (tables, bits): side and scaled distance."""
        margins = self._planes @ np.asarray(vector, np.float32)
        return margins.reshape(self.shape.num_tables, self.shape.num_bits)

    def _codes(self, margins: Floats) -> npt.NDArray[np.int64]:
        return (margins > 0) @ self._weights

    def _names(self, scope: str, codes: npt.NDArray[np.int64]) -> list[str]:
        """Returns the names of buckets probe by probe, so that the likeliest buckets of all tables come first."""
        return [f"{scope}:{table:x}:{code:x}" for column in codes.T.tolist() for table, code in enumerate(column)]


class SimilarIndex:
    """Nearest-neighbour search in a bucket store with one tenant's hyperplanes.

    Args:
        max_candidates: most vectors compared in a search.
    """

    def __init__(self, signatures: Signatures, store: BucketStore, *, max_candidates: int = 512) -> None:
        self._signatures = signatures
        self._store = store
        self._max_candidates = max_candidates

    async def add(self, scope: str, item: str, vector: Floats) -> None:
        """Adds a unit vector (D,), stored as float16. Only searches with the same `scope` find it."""
        await self._store.add(item, self._signatures.buckets(scope, vector), np.asarray(vector, np.float16))

    async def remove(self, item: str) -> None:
        """Removes an item."""
        await self._store.remove(item)

    async def search(self, scope: str, vector: Floats, min_cosine: float, limit: int = 8) -> list[Match]:
        """Returns the nearest items found with at least `min_cosine`, nearest first."""
        probes = self._signatures.probes(scope, vector)
        items, stored = await self._store.find(probes, self._max_candidates, len(vector))
        return matches(items, stored, vector, min_cosine, limit)


def matches(items: Sequence[str], stored: Halves, vector: Floats, min_cosine: float, limit: int) -> list[Match]:
    """Ranks stored vectors (N, D) by exact cosine; returns those with at least `min_cosine`, nearest first."""
    if not items:
        return []
    exact = cosines(stored, vector)
    good = np.flatnonzero(exact >= min_cosine)
    best = good[np.argsort(-exact[good], kind="stable")][:limit]
    return [Match(items[index], float(exact[index])) for index in best.tolist()]


class MemoryBuckets:
    """A `BucketStore` in this process.

    A bucket is an array of row numbers. The vectors of one dimension lie in one array, since cache misses take most of
    the time of a large search.

    Args:
        max_items: most items; the item that was added longest ago is removed first. Adding an item again renews it.
        max_members: most items of a bucket; a full bucket drops its oldest, which stays in its other buckets.
    """

    def __init__(self, max_items: int, max_members: int = 64) -> None:
        self._max_items = max_items
        self._max_members = max_members
        self._buckets: dict[str, array[int]] = {}
        self._items: OrderedDict[str, tuple[Sequence[str], _VectorRows, int]] = OrderedDict()
        self._rows_by_dimension: dict[int, _VectorRows] = {}

    def __len__(self) -> int:
        """Number of items."""
        return len(self._items)

    async def add(self, item: str, buckets: Sequence[str], vector: Halves) -> None:
        """Puts an item with its vector (D,) into its buckets. All vectors of a bucket have one dimension."""
        self._drop(item)
        while len(self._items) >= self._max_items:
            self._drop(next(iter(self._items)))
        if len(vector) not in self._rows_by_dimension:
            self._rows_by_dimension[len(vector)] = _VectorRows(len(vector))
        stored = self._rows_by_dimension[len(vector)]
        row = stored.put(item, vector)
        self._items[item] = (buckets, stored, row)
        for bucket in buckets:
            members = self._buckets.setdefault(bucket, array(ROW))
            if len(members) >= self._max_members:
                del members[0]
            members.append(row)

    async def remove(self, item: str) -> None:
        """Removes an item and its vector."""
        self._drop(item)

    async def discard(self, goes: Callable[[str], bool]) -> bool:
        """Removes all items for which `goes` returns true. Always succeeds."""
        for item in [item for item in self._items if goes(item)]:
            self._drop(item)
        return True

    async def find(self, buckets: Sequence[str], limit: int, dimension: int) -> tuple[Sequence[str], Halves]:
        """Returns at most `limit` items in the order of the buckets, and their vectors (N, `dimension`)."""
        stored = self._rows_by_dimension.get(dimension)
        if stored is None:
            return (), np.empty((0, dimension), np.float16)
        gathered: list[array[int]] = []
        num_gathered, enough = 0, limit
        for bucket in buckets:
            if (members := self._buckets.get(bucket)) is None:
                continue
            gathered.append(members)
            num_gathered += len(members)
            if num_gathered >= enough:
                rows = _rows(gathered)
                if len(rows) >= limit:
                    break
                enough = 2 * num_gathered  # many items are in several buckets
        else:
            rows = _rows(gathered)
        rows = rows[:limit]
        return [stored.names[row] for row in rows.tolist()], stored.vectors[rows]

    def _drop(self, item: str) -> None:
        if item not in self._items:
            return
        buckets, stored, row = self._items.pop(item)
        stored.free.append(row)
        for bucket in buckets:
            members = self._buckets.get(bucket, array(ROW))
            with contextlib.suppress(ValueError):  # a full bucket has dropped the item before
                members.remove(row)
            if not members:
                self._buckets.pop(bucket, None)


def _rows(gathered: Sequence[array[int]]) -> npt.NDArray[np.uint32]:
    """Joins the row numbers without duplicates, in the order of their first occurrence."""
    rows = np.frombuffer(b"".join(gathered), np.dtype(ROW))
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]


class _VectorRows:
    """Vectors of one dimension and the names of their items, by row. A freed row is reused."""

    def __init__(self, dimension: int) -> None:
        self.vectors = np.zeros((64, dimension), np.float16)
        self.names: list[str] = []
        self.free: list[int] = []

    def put(self, item: str, vector: Halves) -> int:
        if self.free:
            row = self.free.pop()
            self.names[row] = item
        else:
            row = len(self.names)
            self.names.append(item)
            if row == len(self.vectors):
                self.vectors = np.concatenate([self.vectors, np.zeros_like(self.vectors)])
        self.vectors[row] = vector
        return row
