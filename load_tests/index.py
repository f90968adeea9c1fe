"""`python -m load_tests.index`: recall and CPU of the caches' indexes against faiss, side by side in one run.

On captions of `icons` through its real encoder and on clustered random vectors
of 768 dimensions. All indexes of a table are built first and asked in turn, a
block of queries each; CPU is that of this thread's process for one lookup.
Prints tables and writes out/index/result.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table
from safelight_server.cache.lsh import Match, MemoryBuckets, Shape, Signatures, SimilarIndex
from safelight_server.cache.neighbours import Neighbours

from load_tests.vectors import OUT, Floats, Vectors, clustered, real

NEAR, FAR = 0.95, 0.65
"""The cosine of SIMILAR, and the lowest from which a latent is taken up."""
EQUAL = 0.002
"""Cosines this near count as equal: float16 and ties."""
BLOCK = 50
LIMIT = 16
SCOPE = "scope"
Search = Callable[[Floats, float], list[Match]]


@dataclass(frozen=True)
class Row:
    """What one index did. Recalls are shares of the queries for which there is something to find.

    Attributes:
        best_near: the nearest stored vector, or an equal one, came first, where it has at least cosine 0.95.
        any_near: something at 0.95 or more was found, likewise.
        best_far: the same at 0.65, where the nearest is below 0.95.
        served: something at 0.95 or more that the text guard lets pass was among the first 16, where there is such.
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


def lsh(vectors: Vectors, shape: Shape, max_members: int, max_candidates: int) -> Search:
    """The caches' own LSH with its store in this process."""
    size = len(vectors.stored)
    index = SimilarIndex(
        Signatures(vectors.stored.shape[1], 1, shape),
        MemoryBuckets(size, max_members),
        max_candidates=max_candidates,
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
    """The caches' own scan of sign bits."""
    size, dimension = vectors.stored.shape
    index = Neighbours(dimension, 1, max_items=size, num_bits=num_bits, num_ranked=num_ranked)
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
    """faiss IndexFlatIP: exact."""
    return _faiss(faiss.IndexFlatIP(vectors.stored.shape[1]), vectors, None)


def faiss_lsh(vectors: Vectors, num_bits: int, num_ranked: int) -> Search:
    """faiss IndexLSH, ranked again by exact cosine as ours is."""
    return _faiss(faiss.IndexLSH(vectors.stored.shape[1], num_bits), vectors, num_ranked)


def table(vectors: Vectors, indexes: dict[str, Callable[[Vectors], Search]]) -> list[Row]:
    """Builds all, asks all in turn, compares with the first, which is exact."""
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
    """For which queries something is stored that is near enough and says the same."""
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


def show(rows: list[Row], console: Console) -> None:
    """One table."""
    shown = Table(title=f"{rows[0].data}, {rows[0].size:,} stored", title_justify="left")
    for column in ("index", "best ≥ 0.95", "any ≥ 0.95", "best 0.65-0.95", "served", "CPU ms p50", "p99", "build s"):
        shown.add_column(column, justify="left" if column == "index" else "right")
    for row in rows:
        shares = (row.best_near, row.any_near, row.best_far, row.served)
        cells = ["-" if share is None else f"{share:.3f}" for share in shares]
        shown.add_row(row.index, *cells, f"{row.cpu_ms_p50:.2f}", f"{row.cpu_ms_p99:.2f}", f"{row.build_s:.0f}")
    console.print(shown)


def shapes(words: list[str]) -> list[tuple[Shape, int, int]]:
    """ "8x16x4x64x512": tables, bits, probes, members a bucket keeps, candidates a search compares."""
    numbers = [[int(number) for number in word.split("x")] for word in words]
    return [(Shape(*first), members, candidates) for *first, members, candidates in numbers]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--data", nargs="+", choices=("real", "clustered"), default=["real", "clustered"])
    parser.add_argument("--shapes", nargs="+", default=["8x16x4x64x512", "12x20x8x64x512"])
    parser.add_argument("--bits", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--ranked", type=int, default=256)
    parser.add_argument("--out", type=Path, default=OUT / "result.json")
    options = parser.parse_args()
    console = Console(width=140)
    rows: list[Row] = []
    load_before = os.getloadavg()
    for data in options.data:
        for size in options.sizes:
            indexes: dict[str, Callable[[Vectors], Search]] = {"faiss Flat": flat}
            for bits in options.bits:
                indexes[f"faiss LSH {bits}, {options.ranked} ranked"] = lambda v, b=bits: faiss_lsh(
                    v, b, options.ranked
                )
                indexes[f"neighbours {bits}, {options.ranked} ranked"] = lambda v, b=bits: neighbours(
                    v, b, options.ranked
                )
            for shape, members, candidates in shapes(options.shapes):
                tables = f"LSH {shape.num_tables}x{shape.num_bits}, {shape.num_probes} probes"
                name = f"{tables}, {members} a bucket, {candidates} compared"
                indexes[name] = lambda v, s=shape, m=members, c=candidates: lsh(v, s, m, c)
            vectors = (real if data == "real" else clustered)(size, options.queries)
            made = table(vectors, indexes)
            show(made, console)
            rows += made
    load = {"before": load_before, "after": os.getloadavg(), "cpus": os.cpu_count(), "machine": platform.machine()}
    console.print(f"load average before {load_before[0]:.1f}, after {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"load": load, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
