"""Nearest-neighbour search at lower cosine: a full scan of sign-bit codes, with the best ranked by exact cosine.

LSH buckets miss most neighbours much below cosine 0.9; a scan of short codes does not. Each vector is stored as the
signs of its products with random hyperplanes, as in faiss' IndexLSH. A search takes the nearest codes by Hamming
distance and ranks them by exact cosine. The index lives in the memory of one replica and is rebuilt from the store.

Invariants: every match has the requested scope and at least the requested cosine; at most `max_items` are stored.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable

import faiss
import numpy as np
import numpy.typing as npt

from safelight_server.cache.approximate.embedding import cosines
from safelight_server.cache.approximate.lsh import Match

Floats = npt.NDArray[np.float32]

faiss.omp_set_num_threads(1)  # one search is too short to share, and the cores belong to the denoiser


class SketchIndex:
    """The index of one tenant or pool.

    Args:
        dimension: D of the vectors.
        seed: of the random hyperplanes.
        max_items: most items; the item that was added or found longest ago is removed first.
        num_bits: bits of a code, a multiple of 64.
        num_ranked: nearest codes whose exact cosine is computed in a search.
    """

    def __init__(
        self, dimension: int, seed: int, *, max_items: int, num_bits: int = 256, num_ranked: int = 256
    ) -> None:
        rng = np.random.Generator(np.random.Philox(key=seed))
        self._planes = rng.standard_normal((num_bits, dimension), np.float32)
        self._max_items = max_items
        self._num_ranked = num_ranked
        self._rows_by_scope: dict[str, _SketchRows] = {}
        self._scopes: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        """Number of items."""
        return len(self._scopes)

    def __contains__(self, item: str) -> bool:
        """Whether the index has the item."""
        return item in self._scopes

    def add(self, scope: str, item: str, vector: Floats) -> list[str]:
        """Adds a unit vector (D,), stored as float16, or replaces it.

        Args:
            scope: only searches with the same scope find the item.

        Returns:
            The items that were removed to make room.
        """
        self.remove(item)
        gone = []
        while len(self._scopes) >= self._max_items:
            oldest = next(iter(self._scopes))
            self.remove(oldest)
            gone.append(oldest)
        if scope not in self._rows_by_scope:
            self._rows_by_scope[scope] = _SketchRows(*self._planes.shape)
        self._rows_by_scope[scope].put(item, self._code(vector), vector)
        self._scopes[item] = scope
        return gone

    def remove(self, item: str) -> None:
        """Removes an item. An absent item is no error."""
        scope = self._scopes.pop(item, None)
        if scope is not None:
            stored = self._rows_by_scope[scope]
            stored.take(item)
            if not stored.rows:
                del self._rows_by_scope[scope]

    def discard(self, goes: Callable[[str], bool]) -> None:
        """Removes all items for which `goes` returns true."""
        for item in [item for item in self._scopes if goes(item)]:
            self.remove(item)

    def search(self, scope: str, vector: Floats, min_cosine: float, limit: int = 8) -> list[Match]:
        """Returns the nearest items found in `scope` with at least `min_cosine`, nearest first."""
        stored = self._rows_by_scope.get(scope)
        if stored is None:
            return []
        found = stored.nearest(self._code(vector), vector, self._num_ranked, min_cosine, limit)
        for match in found:
            self._scopes.move_to_end(match.item)
        return found

    def _code(self, vector: Floats) -> npt.NDArray[np.uint8]:
        return np.packbits(self._planes @ np.asarray(vector, np.float32) > 0)[None]


class _SketchRows:
    """The codes and vectors of one scope, by row. A freed row is reused; until then its name is None."""

    def __init__(self, num_bits: int, dimension: int) -> None:
        self.rows: dict[str, int] = {}
        self._names: list[str | None] = []
        self._free: list[int] = []
        self._codes = faiss.IndexBinaryFlat(num_bits)
        self._vectors = np.zeros((64, dimension), np.float16)

    def put(self, item: str, code: npt.NDArray[np.uint8], vector: Floats) -> None:
        if self._free:
            row = self._free.pop()
            self._overwrite(row, code)
            self._names[row] = item
        else:
            row = len(self._names)
            self._codes.add(code)
            self._names.append(item)
            if row == len(self._vectors):
                self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
        self._vectors[row] = vector
        self.rows[item] = row

    def take(self, item: str) -> None:
        row = self.rows.pop(item)
        self._names[row] = None
        self._free.append(row)

    def nearest(
        self, code: npt.NDArray[np.uint8], vector: Floats, count: int, min_cosine: float, limit: int
    ) -> list[Match]:
        """Ranks the `count` nearest codes, or all rows if there are no more, by exact cosine, nearest first."""
        num_rows = len(self._names)
        if num_rows <= count:
            rows = np.arange(num_rows)
        else:
            rows = self._codes.search(code, min(num_rows, count + len(self._free)))[1][0]
        exact = cosines(self._vectors[rows], vector)
        good = np.flatnonzero(exact >= min_cosine)
        order = good[np.argsort(-exact[good], kind="stable")]
        named = ((self._names[row], float(cosine)) for row, cosine in zip(rows[order], exact[order], strict=True))
        there = (Match(name, cosine) for name, cosine in named if name is not None)
        return list(itertools.islice(there, limit))

    def _overwrite(self, row: int, code: npt.NDArray[np.uint8]) -> None:
        data = self._codes.xb.data()  # type: ignore[attr-defined]  # faiss' stubs leave out the codes
        stored = faiss.rev_swig_ptr(data, self._codes.ntotal * self._codes.code_size)
        stored.reshape(self._codes.ntotal, -1)[row] = code[0]
