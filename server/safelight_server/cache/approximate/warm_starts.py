"""Latents to start from: checkpoints of outputs with nearby prompts, so that the first steps need not be made.

NIRVANA (Agarwal et al. 2024, arXiv 2312.04429): the nearer the prompt, the later
the step. Which outputs' checkpoints stay is decided by the least benefit of
theirs that is left out. In memory, one of each replica; what other replicas or
an earlier life of this one kept is looked up, off the request path, when a namespace
is first used and every few minutes while it is; and what its index had when that
index had to go, when it is used again. Invariants: a start is a checkpoint of an output with the same comparable
name; what the books count can be found. Neighbours: `index`, `skip_policy`,
`checkpoints`, `eviction`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from safelight_server.cache.approximate.embedding import Floats
from safelight_server.cache.approximate.eviction import Eviction
from safelight_server.cache.approximate.index import SketchIndex
from safelight_server.cache.approximate.skip_policy import SkipPolicy
from safelight_server.cache.approximate.vectors import StoredVector, Vectors
from safelight_server.cache.checkpoints import Checkpoints
from safelight_server.cache.namespaces import CacheKeys, Namespace
from safelight_server.catalog.catalog import Pipeline
from safelight_server.engine.latents import Snapshot
from safelight_server.storage.purge import EntryOwner, PurgeScope

MAX_INDEXES = 64
MAX_NAMESPACES = 4096
LOOK_EVERY_S = 300.0
"""How often what other replicas have kept of a namespace is looked up, while it is in use."""
NUM_CANDIDATES = 64
NUM_TRIED = 4
"""Of the candidates that may be begun from, the nearest, whose checkpoints are looked up."""


@dataclass(frozen=True, slots=True)
class WarmStart:
    """Where an output may begin in place of noise."""

    snapshot: Snapshot
    similarity: float


@dataclass(frozen=True, slots=True)
class _StartLocation:
    """Where an output is: its index, by namespace and pipeline; and whose it is."""

    namespace: Namespace
    index: tuple[str, str]
    owner: EntryOwner


class WarmStarts:
    """Index of the outputs whose checkpoints other outputs may start from.

    Args:
        skip_policy: how many steps a cosine saves.
        books: decide what goes when the checkpoints of all outputs are too many bytes.
        max_items: outputs in one index.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        vectors: Vectors,
        skip_policy: SkipPolicy,
        books: Eviction,
        max_items: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoints = checkpoints
        self._vectors = vectors
        self._clock = clock
        self._looked: OrderedDict[str, float] = OrderedDict()
        self._rebuilding: set[asyncio.Task[None]] = set()
        self._skip_policy = skip_policy
        self._books = books
        self._max_items = max_items
        self._indexes: OrderedDict[tuple[str, str], SketchIndex] = OrderedDict()
        self._place: dict[str, _StartLocation] = {}

    async def add(
        self, name: CacheKeys, pipeline: Pipeline, vector: Floats, owner: EntryOwner, num_steps: int, num_bytes: int
    ) -> None:
        """An output with checkpoints has ended well.

        Args:
            num_bytes: of its checkpoints.
        """
        kept = StoredVector(name, pipeline.digest, vector, num_steps, num_bytes, owner)
        await self._vectors.keep(kept)
        await self._add(kept)

    async def _add(self, kept: StoredVector) -> None:
        name = kept.name
        at, index = self._index(name.namespace, kept.pipeline, len(kept.vector))
        gone = index.add(name.comparable, name.exact, kept.vector)
        self._place[name.exact] = _StartLocation(name.namespace, at, kept.owner)
        most = self._skip_policy.steps(kept.num_steps)
        gone += self._books.add(name.exact, kept.num_bytes, float(most[-1]) if most else 0.0)
        for item in gone:
            await self._drop(item)

    async def _rebuild(self, namespace: Namespace) -> None:
        """Adds what the tiers have of a namespace and is not known here."""
        async for kept in self._vectors.all(namespace, self._place):
            await self._add(kept)

    async def _refill(self, at: tuple[str, str]) -> None:
        """Adds again what was in an index that had to go."""
        for item, place in [(item, place) for item, place in self._place.items() if place.index == at]:
            kept = await self._vectors.get(place.namespace, item)
            if kept is None:
                self._forget(item)
            elif item in self._place:
                await self._add(kept)

    async def rebuilt(self) -> None:
        """Waits until what was begun to be looked up is there."""
        while self._rebuilding:
            await asyncio.wait(self._rebuilding)

    async def close(self) -> None:
        """Looks nothing up any more: the tiers are about to be closed."""
        for task in self._rebuilding:
            task.cancel()
        await self.rebuilt()

    async def find(
        self, name: CacheKeys, pipeline: Pipeline, vector: Floats, num_steps: int, excluded: set[str]
    ) -> WarmStart | None:
        """The latest start that a nearby prompt allows, if there is one.

        Args:
            excluded: exact names of outputs from which none may begin; the one that is found is added.
        """
        _, index = self._index(name.namespace, pipeline.digest, len(vector))
        found = index.search(name.comparable, vector, self._skip_policy.thresholds[0], NUM_CANDIDATES)
        useful = (match for match in found if match.item not in excluded and self._skip_policy.fraction(match.cosine))
        for match in itertools.islice(useful, NUM_TRIED):
            steps = await self._checkpoints.steps(name.namespace.name, match.item)
            step = self._skip_policy.start_step(match.cosine, num_steps, steps)
            snapshot = await self._checkpoints.at_or_before(name.namespace.name, match.item, step) if step else None
            if match.item in excluded:  # meanwhile, by another output of its request
                continue
            if snapshot is not None:
                excluded.add(match.item)
                self._books.hit(match.item)
                return WarmStart(snapshot, match.cosine)
            if not steps and await self._checkpoints.gone(name.namespace.name, match.item):
                await self._drop(match.item)
        return None

    async def forget(self, scope: PurgeScope) -> bool:
        """Starts no output any more from what was purged."""
        for item in [item for item, place in self._place.items() if scope.includes(place.owner)]:
            self._forget(item)
        return True

    async def _drop(self, item: str) -> None:
        place = self._forget(item)
        if place is not None:
            await self._checkpoints.delete(place.namespace.name, item)
            await self._vectors.forget(place.namespace, item)

    def _forget(self, item: str) -> _StartLocation | None:
        self._books.remove(item)
        place = self._place.pop(item, None)
        if place is not None and (index := self._indexes.get(place.index)) is not None:
            index.remove(item)
        return place

    def _index(self, namespace: Namespace, pipeline: str, dimension: int) -> tuple[tuple[str, str], SketchIndex]:
        at = (namespace.name, pipeline)
        index = self._indexes.get(at)
        if index is None:
            seed = namespace.seed(f"codes {pipeline}")
            index = self._indexes[at] = SketchIndex(dimension, seed, max_items=self._max_items)
            if namespace.name in self._looked:
                self._start(self._refill(at))
        if self._clock() - self._looked.get(namespace.name, -math.inf) >= LOOK_EVERY_S:
            self._looked[namespace.name] = self._clock()
            self._start(self._rebuild(namespace))
            if len(self._looked) > MAX_NAMESPACES:
                self._looked.popitem(last=False)
        self._indexes.move_to_end(at)
        if len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)
        return at, index

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._rebuilding.add(task)
        task.add_done_callback(self._rebuilding.discard)
