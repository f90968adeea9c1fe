"""The prompt vectors of finished outputs as they are kept, so that an index in memory can be made anew.

One small sealed entry for each output whose checkpoints others may start from.
Neighbours: `warm_starts` writes and reads them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Container
from dataclasses import dataclass

import numpy as np

from safelight_server.cache.approximate.embedding import Floats
from safelight_server.cache.namespaces import CacheKeys, Namespace
from safelight_server.storage.purge import EntryOwner
from safelight_server.storage.sealed import Entry
from safelight_server.storage.tiers import Tiers

MAX_KEPT = 100_000
"""Entries looked at when an index is made anew."""


@dataclass(frozen=True, slots=True)
class StoredVector:
    """One output.

    Attributes:
        pipeline: digest of the pipeline whose encoder made the vector.
        num_bytes: of its checkpoints.
        owner: what to purge it by.
    """

    name: CacheKeys
    pipeline: str
    vector: Floats
    num_steps: int
    num_bytes: int
    owner: EntryOwner


class Vectors:
    """In all tiers."""

    def __init__(self, tiers: Tiers, ttl_s: float) -> None:
        self._tiers = tiers
        self._ttl_s = ttl_s

    async def keep(self, kept: StoredVector) -> None:
        """Keeps the vector of an output."""
        facts = {"comparable": kept.name.comparable, "pipeline": kept.pipeline}
        facts |= {"steps": str(kept.num_steps), "bytes": str(kept.num_bytes)}
        data = np.asarray(kept.vector, np.float16).tobytes()
        entry = Entry(data, facts, kept.owner.revision, kept.owner.generation)
        await self._tiers.put(_key(kept.name.namespace, kept.name.exact), entry, self._ttl_s)

    async def forget(self, namespace: Namespace, exact: str) -> None:
        """Its checkpoints are gone."""
        await self._tiers.delete(_key(namespace, exact))

    async def all(self, namespace: Namespace, known: Container[str] = ()) -> AsyncIterator[StoredVector]:
        """Those of a space, as far as the tiers tell, without those that are known."""
        prefix = _key(namespace, "")
        for key in await self._tiers.keys(prefix, MAX_KEPT):
            exact = key.removeprefix(prefix)
            kept = None if exact in known else await self.get(namespace, exact)
            if kept is not None and exact not in known:
                yield kept

    async def get(self, namespace: Namespace, exact: str) -> StoredVector | None:
        """That of one output."""
        found = await self._tiers.get(_key(namespace, exact))
        if found is None:
            return None
        at = found.entry.metadata
        name = CacheKeys(namespace, exact, at["comparable"])
        vector = np.frombuffer(found.entry.data, np.float16).astype(np.float32)
        owner = EntryOwner(f"{namespace.prefix}/", found.entry.revision, found.entry.generation)
        return StoredVector(name, at["pipeline"], vector, int(at["steps"]), int(at["bytes"]), owner)


def _key(namespace: Namespace, exact: str) -> str:
    return f"{namespace.prefix}/vector/{exact}"
