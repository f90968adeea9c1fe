"""Warm starts: finds checkpoints of outputs with similar prompts, so that an output can skip its first steps.

NIRVANA (Agarwal et al. 2024, arXiv 2312.04429): the more similar the prompt, the later the step. An eviction policy
decides which outputs keep their checkpoints.

Each replica has its own index in memory. It loads the vectors that other replicas or earlier processes stored, in the
background, when a namespace is first used and every `LOOK_EVERY_S` while it is in use. An index that was dropped for
another is filled again when it is next used.

Invariants: a warm start is a checkpoint of an output with the same comparable name; every output that the eviction
policy counts can be found.
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
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.engine.latents import Snapshot
from safelight_server.storage.purge import EntryOwner, PurgeScope
from safelight_server.telemetry.background import log_failure

MAX_INDEXES = 64
MAX_NAMESPACES = 4096
LOOK_EVERY_S = 300.0
"""Seconds between reads of the vectors that other replicas stored in a namespace in use."""
NUM_CANDIDATES = 64
NUM_TRIED = 4
"""Most candidates whose checkpoints are read, the nearest first."""


@dataclass(frozen=True, slots=True)
class WarmStart:
    """A latent to start from instead of noise, and the cosine of the two prompts."""

    snapshot: Snapshot
    similarity: float


@dataclass(frozen=True, slots=True)
class _StartLocation:
    """The index that holds an output, by namespace and pipeline, and the output's owner."""

    namespace: Namespace
    index: tuple[str, str]
    owner: EntryOwner


class WarmStarts:
    """Index of the outputs whose checkpoints other outputs may start from.

    Args:
        skip_policy: how many steps to skip at a cosine.
        eviction: the eviction policy that bounds the bytes of all checkpoints.
        max_items: most outputs in one index.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        vectors: Vectors,
        skip_policy: SkipPolicy,
        eviction: Eviction,
        max_items: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoints = checkpoints
        self._vectors = vectors
        self._clock = clock
        self._looked: OrderedDict[str, float] = OrderedDict()
        self._rebuilding: set[asyncio.Task[None]] = set()
        self._skip_policy = skip_policy
        self._eviction = eviction
        self._max_items = max_items
        self._indexes: OrderedDict[tuple[str, str], SketchIndex] = OrderedDict()
        self._place: dict[str, _StartLocation] = {}

    async def add(
        self, name: CacheKeys, pipeline: Pipeline, vector: Floats, owner: EntryOwner, num_steps: int, num_bytes: int
    ) -> None:
        """Adds a finished output with checkpoints.

        Args:
            num_bytes: total size of its checkpoints.
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
        gone += self._eviction.add(name.exact, kept.num_bytes, float(most[-1]) if most else 0.0)
        for item in gone:
            await self._drop(item)

    async def _rebuild(self, namespace: Namespace) -> None:
        """Adds the stored outputs of a namespace that this replica does not know yet."""
        async for kept in self._vectors.all(namespace, self._place):
            await self._add(kept)

    async def _refill(self, at: tuple[str, str]) -> None:
        """Fills an index that was dropped with the outputs that it had."""
        for item, place in [(item, place) for item, place in self._place.items() if place.index == at]:
            kept = await self._vectors.get(place.namespace, item)
            if kept is None:
                self._forget(item)
            elif item in self._place:
                await self._add(kept)

    async def rebuilt(self) -> None:
        """Waits until all background loads have ended."""
        while self._rebuilding:
            await asyncio.wait(self._rebuilding)

    async def close(self) -> None:
        """Cancels the background loads, before the tiers are closed."""
        for task in self._rebuilding:
            task.cancel()
        await self.rebuilt()

    async def find(
        self, name: CacheKeys, pipeline: Pipeline, vector: Floats, num_steps: int, excluded: set[str]
    ) -> WarmStart | None:
        """Returns a checkpoint of the nearest prompt that has one to start from, or None.

        Args:
            excluded: exact names of outputs that must not be used; the one that is used is added.
        """
        _, index = self._index(name.namespace, pipeline.digest, len(vector))
        found = index.search(name.comparable, vector, self._skip_policy.thresholds[0], NUM_CANDIDATES)
        useful = (match for match in found if match.item not in excluded and self._skip_policy.fraction(match.cosine))
        for match in itertools.islice(useful, NUM_TRIED):
            steps = await self._checkpoints.steps(name.namespace.name, match.item)
            step = self._skip_policy.start_step(match.cosine, num_steps, steps)
            snapshot = await self._checkpoints.at_or_before(name.namespace.name, match.item, step) if step else None
            if match.item in excluded:  # another output of the request took it during the await
                continue
            if snapshot is not None:
                excluded.add(match.item)
                self._eviction.hit(match.item)
                return WarmStart(snapshot, match.cosine)
            if not steps and await self._checkpoints.gone(name.namespace.name, match.item):
                await self._drop(match.item)
        return None

    async def forget(self, scope: PurgeScope) -> bool:
        """Removes purged outputs from the index. Always succeeds."""
        for item in [item for item, place in self._place.items() if scope.includes(place.owner)]:
            self._forget(item)
        return True

    async def _drop(self, item: str) -> None:
        place = self._forget(item)
        if place is not None:
            await self._checkpoints.delete(place.namespace.name, item)
            await self._vectors.forget(place.namespace, item)

    def _forget(self, item: str) -> _StartLocation | None:
        self._eviction.remove(item)
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
        task.add_done_callback(log_failure)
