"""Compares the two indexes of similar pictures on the trace: LSH tables, scans, and tables before a scan.

Each arrangement replays the trace as the server looks up a picture with
ALLOW_SIMILAR: nearest first, with at least `MIN_SIMILARITY`, equal text facts, and at
most `MAX_USES` uses of one picture. A request without a hit is stored. Before the
trace `num_stored` other captions are stored, as after a long time of operation.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from safelight_server.cache.approximate.guard import Guard, TextFacts
from safelight_server.cache.approximate.index import SketchIndex
from safelight_server.cache.approximate.lsh import Match, MemoryBuckets, Signatures, SimilarIndex
from safelight_server.settings import Settings

from load_tests.bench.runner import Report, Row
from load_tests.calibration.eviction import CANDIDATES, MAX_USES
from load_tests.calibration.trace import DEFAULT, SEEDS, trace
from load_tests.calibration.vectors import Encoder, Floats, captions

MIN_SIMILARITY = 0.7
NUM_SCANNED = 10_000
"""Number of pictures that the server scans: the newest of a namespace."""
ARRANGEMENTS = (("tables",), ("newest",), ("all",), ("tables", "newest"))
"""Arrangements of indexes, by name; the last one is the server's."""
SCOPE = "scope"
Search = Callable[[Floats], Sequence[Match]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to replay."""

    seeds: tuple[int, ...] = SEEDS
    num_requests: int = DEFAULT.num_requests
    num_stored: tuple[int, ...] = (0, 100_000)


SMOKE = Plan(seeds=(1,), num_requests=20, num_stored=(20,))


class Indexes:
    """Both indexes of the server, as in `cache.approximate.similar`."""

    def __init__(self, dimension: int) -> None:
        most: int = Settings.model_fields["cache_similar_items"].default
        self._tables = SimilarIndex(Signatures(dimension, 1), MemoryBuckets(most))
        self._newest = SketchIndex(dimension, 2, max_items=NUM_SCANNED)
        self._all = SketchIndex(dimension, 2, max_items=most)

    def add(self, item: int, vector: Floats) -> None:
        """Stores a vector (D,)."""
        with contextlib.suppress(StopIteration):
            self._tables.add(SCOPE, str(item), vector).send(None)
        self._newest.add(SCOPE, str(item), vector)
        self._all.add(SCOPE, str(item), vector)

    def tables(self, vector: Floats) -> Sequence[Match]:
        """Searches the LSH tables."""
        try:
            self._tables.search(SCOPE, vector, MIN_SIMILARITY, CANDIDATES).send(None)
        except StopIteration as done:
            found: Sequence[Match] = done.value
            return found
        raise RuntimeError("a store in this process never waits")

    def newest(self, vector: Floats) -> Sequence[Match]:
        """Scans the newest items, as the server does."""
        return self._newest.search(SCOPE, vector, MIN_SIMILARITY, CANDIDATES)

    def all(self, vector: Floats) -> Sequence[Match]:
        """Scans as many items as the tables hold."""
        return self._all.search(SCOPE, vector, MIN_SIMILARITY, CANDIDATES)


def replay(
    order: Sequence[str], indexes: Indexes, vectors: Floats, facts: Sequence[TextFacts], first: int
) -> tuple[float, list[float]]:
    """Replays requests; returns the share that a stored picture answers, and the CPU milliseconds of each lookup.

    Args:
        order: the indexes to search; each is used if those before it have found no usable picture.
        vectors: (N, D), the vectors of all captions.
        facts: the facts of all captions, in the same order.
        first: the index of the first caption that is a request; those before it are stored.
    """
    searches: dict[str, Search] = {"tables": indexes.tables, "newest": indexes.newest, "all": indexes.all}
    uses: Counter[int] = Counter()
    times, num_hits = [], 0
    for number in range(first, len(vectors)):
        began = time.process_time()
        source = None
        for name in order:
            found = (int(match.item) for match in searches[name](vectors[number]))
            source = next((item for item in found if facts[item] == facts[number] and uses[item] < MAX_USES), None)
            if source is not None:
                break
        times.append(1e3 * (time.process_time() - began))
        if source is None:
            indexes.add(number, vectors[number])
        else:
            uses[source] += 1
            num_hits += 1
    return num_hits / len(times), times


def measure(plan: Plan) -> Report:
    """Runs all arrangements on all traces; returns one table for each number of stored pictures."""
    encoder = Encoder()
    guard = Guard(encoder.pipeline.manifest.guard)
    tables: dict[str, Sequence[Row]] = {}
    for num_stored in plan.num_stored:
        before = captions(num_stored, seed=99)
        stored = [encoder(before[i : i + 4096]) for i in range(0, num_stored, 4096)]
        rows: list[Row] = []
        for seed in plan.seeds:
            prompts = [request.prompt for request in trace(seed)[: plan.num_requests]]
            vectors = np.concatenate([*stored, encoder(prompts)])
            facts = [guard.facts(prompt) for prompt in (*before, *prompts)]
            for order in ARRANGEMENTS:
                indexes = Indexes(vectors.shape[1])
                for item in range(num_stored):
                    indexes.add(item, vectors[item])
                share, times = replay(order, indexes, vectors, facts, num_stored)
                p50, p99 = np.percentile(times, (50, 99))
                rows.append(
                    {
                        "seed": seed,
                        "indexes": ", then ".join(order),
                        "answered": share,
                        "cpu_ms_p50": float(p50),
                        "cpu_ms_p99": float(p99),
                    }
                )
        tables[f"Answered as similar, {num_stored:,} stored before"] = rows
    return Report("similar", tables)
