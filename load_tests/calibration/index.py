"""Measures recall and CPU time of the caches' vector indexes against faiss, side by side in one run.

Vectors are captions of `icons` through its real encoder, and clustered random
vectors of 768 dimensions. All indexes of a table are built first and queried in
turn, a block of queries each. CPU is that of this process for one lookup. A
million vectors take about 14 GiB and, the first time, a quarter of an hour.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
from safelight_server.cache.approximate.index import SketchIndex
from safelight_server.cache.approximate.lsh import Match, MemoryBuckets, Shape, Signatures, SimilarIndex

from load_tests.bench.runner import Report, Target
from load_tests.calibration.vectors import Floats, Vectors, clustered, real

NEAR, FAR = 0.95, 0.65
"""The minimum cosine of SIMILAR, and that of warm starts from a latent."""
EQUAL = 0.002
"""Cosines that differ by less count as equal, because of float16 and ties."""
BLOCK = 50
LIMIT = 16
SCOPE = "scope"
RECALL_BAR, CPU_BAR_MS = 0.99, 2.0
Search = Callable[[Floats, float], list[Match]]


@dataclass(frozen=True, slots=True)
class Kind:
    """Settings of the LSH index: most items per bucket, and most candidates compared per search."""

    shape: Shape
    max_members: int = 64
    max_candidates: int = 512


CHOSEN = Kind(Shape())
"""The settings that the server uses."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure.

    Attributes:
        bits: bits of faiss' and our scans; the best `num_ranked` of their results are compared exactly.
    """

    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    num_queries: int = 1000
    data: tuple[str, ...] = ("real", "clustered")
    lsh: tuple[Kind, ...] = (Kind(Shape(8, 16, 4)), CHOSEN)
    bits: tuple[int, ...] = (256, 512)
    num_ranked: int = 256


SMOKE = Plan(sizes=(200,), num_queries=20, bits=(256,))


@dataclass(frozen=True)
class Row:
    """Results of one index. Recalls are shares of the queries for which there is something to find.

    Attributes:
        best_near: the nearest stored vector, or an equal one, came first; of queries with one at cosine 0.95 or more.
        any_near: some vector at 0.95 or more was found; of the same queries.
        best_far: as `best_near`, of queries whose nearest is at 0.65 or more but below 0.95.
        served: a vector at 0.95 or more that the text guard accepts was among the first 16; of queries that have one.
    """

    data: str
    size: int
    index: str
    best_near: float | None
    any_near: float | None
    best_far: float | None
    served: float | None
    cpu_ms_p50: float
    cpu_ms_p99: float
    build_s: float


def lsh(vectors: Vectors, kind: Kind) -> Search:
    """Builds the caches' LSH index with its store in this process."""
    size = len(vectors.stored)
    index = SimilarIndex(
        Signatures(vectors.stored.shape[1], 1, kind.shape),
        MemoryBuckets(size, kind.max_members),
        max_candidates=kind.max_candidates,
    )

    async def fill() -> None:
        for item, vector in enumerate(vectors.stored):
            await index.add(SCOPE, str(item), vector.astype(np.float32))

    asyncio.run(fill())

    def search(query: Floats, min_cosine: float) -> list[Match]:
        found = index.search(SCOPE, query, min_cosine, LIMIT)
        try:
            found.send(None)
        except StopIteration as done:
            return list(done.value)
        raise RuntimeError("a store in this process never waits")

    return search


def neighbours(vectors: Vectors, num_bits: int, num_ranked: int) -> Search:
    """Builds the caches' scan of sign bits."""
    size, dimension = vectors.stored.shape
    index = SketchIndex(dimension, 1, max_items=size, num_bits=num_bits, num_ranked=num_ranked)
    for item, vector in enumerate(vectors.stored):
        index.add(SCOPE, str(item), vector.astype(np.float32))
    return lambda query, min_cosine: index.search(SCOPE, query, min_cosine, LIMIT)


def _faiss(index: faiss.Index, vectors: Vectors, num_ranked: int | None) -> Search:
    for start in range(0, len(vectors.stored), 50_000):
        index.add(vectors.stored[start : start + 50_000].astype(np.float32))

    def search(query: Floats, min_cosine: float) -> list[Match]:
        cosines, ids = index.search(query[None], num_ranked or LIMIT)
        rows, found = ids[0], cosines[0]
        if num_ranked is not None:
            found = vectors.stored[rows].astype(np.float32) @ query
            order = np.argsort(-found)[:LIMIT]
            rows, found = rows[order], found[order]
        return [Match(str(row), float(c)) for row, c in zip(rows, found, strict=True) if c >= min_cosine]

    return search


def flat(vectors: Vectors) -> Search:
    """Builds faiss IndexFlatIP, which is exact."""
    return _faiss(faiss.IndexFlatIP(vectors.stored.shape[1]), vectors, None)


def faiss_lsh(vectors: Vectors, num_bits: int, num_ranked: int) -> Search:
    """Builds faiss IndexLSH, with its results ranked by exact cosine, as the caches do."""
    return _faiss(faiss.IndexLSH(vectors.stored.shape[1], num_bits), vectors, num_ranked)


def table(vectors: Vectors, indexes: dict[str, Callable[[Vectors], Search]]) -> list[Row]:
    """Builds all indexes, queries them in turn, and compares each with the first, which is exact."""
    searches: dict[str, Search] = {}
    built: dict[str, float] = {}
    for name, build in indexes.items():
        begin = time.process_time()
        searches[name] = build(vectors)
        built[name] = time.process_time() - begin
    found: dict[str, list[list[Match]]] = {name: [] for name in indexes}
    cpu: dict[str, list[float]] = {name: [] for name in indexes}
    for start in range(0, len(vectors.queries), BLOCK):
        for name, search in searches.items():
            for query in vectors.queries[start : start + BLOCK]:
                begin = time.process_time()
                found[name].append(search(query, FAR))
                cpu[name].append(1e3 * (time.process_time() - begin))
    exact = found[next(iter(indexes))]
    served = _servable(vectors)
    return [
        Row(
            vectors.name,
            len(vectors.stored),
            name,
            **_recalls(found[name], exact, served, vectors),
            cpu_ms_p50=float(np.percentile(cpu[name], 50)),
            cpu_ms_p99=float(np.percentile(cpu[name], 99)),
            build_s=built[name],
        )
        for name in indexes
    ]


def _recalls(
    found: list[list[Match]], exact: list[list[Match]], servable: list[bool] | None, vectors: Vectors
) -> dict[str, float | None]:
    best = [matches[0].cosine if matches else -1.0 for matches in exact]
    ours = [matches[0].cosine if matches else -1.0 for matches in found]
    pairs = list(zip(ours, best, strict=True))
    served = None
    if servable is not None and vectors.facts is not None and vectors.facts_of_queries is not None:
        got = [
            any(m.cosine >= NEAR and vectors.facts[int(m.item)] == fact for m in matches)
            for matches, fact in zip(found, vectors.facts_of_queries, strict=True)
        ]
        served = _share([g for g, s in zip(got, servable, strict=True) if s])
    return {
        "best_near": _share([one >= other - EQUAL for one, other in pairs if other >= NEAR]),
        "any_near": _share([one >= NEAR for one, other in pairs if other >= NEAR]),
        "best_far": _share([one >= other - EQUAL for one, other in pairs if FAR <= other < NEAR]),
        "served": served,
    }


def _servable(vectors: Vectors) -> list[bool] | None:
    """Returns for each query whether a stored vector is near enough and has equal text facts; None without texts."""
    if vectors.facts is None or vectors.facts_of_queries is None:
        return None
    rows: dict[int, list[int]] = {}
    for row, fact in enumerate(vectors.facts.tolist()):
        rows.setdefault(fact, []).append(row)
    alike = [rows.get(fact, []) for fact in vectors.facts_of_queries.tolist()]
    return [
        bool(same) and bool((vectors.stored[same].astype(np.float32) @ query >= NEAR).any())
        for same, query in zip(alike, vectors.queries, strict=True)
    ]


def _share(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def measure(plan: Plan) -> Report:
    """Runs the measurement; returns a table for each kind of vectors and each size."""
    tables: dict[str, Sequence[Mapping[str, Any]]] = {}
    targets: list[Target] = []
    for data in plan.data:
        for size in plan.sizes:
            vectors = real(size, plan.num_queries) if data == "real" else clustered(size, plan.num_queries)
            rows = table(vectors, _indexes(plan))
            tables[f"{vectors.name}, {size:,} stored"] = [asdict(row) for row in rows]
            [ours] = [row for row in rows if row.index == _name(CHOSEN)]
            what = f"{_name(CHOSEN)}, at {size:,} {vectors.name}"
            if ours.any_near is not None:
                targets.append(Target(f"recall of any at 0.95, {what}", ours.any_near, RECALL_BAR))
            targets.append(Target(f"2 ms by the p99 of a lookup's CPU, {what}", CPU_BAR_MS / ours.cpu_ms_p99, 1.0))
    return Report("index", tables, targets)


def _indexes(plan: Plan) -> dict[str, Callable[[Vectors], Search]]:
    """Returns the builders of the indexes; the first is exact."""
    indexes: dict[str, Callable[[Vectors], Search]] = {"faiss Flat": flat}
    for bits in plan.bits:
        indexes[f"faiss LSH {bits}"] = functools.partial(faiss_lsh, num_bits=bits, num_ranked=plan.num_ranked)
        indexes[f"neighbours {bits}"] = functools.partial(neighbours, num_bits=bits, num_ranked=plan.num_ranked)
    for kind in plan.lsh:
        indexes[_name(kind)] = functools.partial(lsh, kind=kind)
    return indexes


def _name(kind: Kind) -> str:
    shape = kind.shape
    tables = f"LSH {shape.num_tables}x{shape.num_bits}, {shape.num_probes} probes"
    return f"{tables}, {kind.max_members} a bucket, {kind.max_candidates} compared"
