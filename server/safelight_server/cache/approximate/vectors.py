"""Stores the prompt vectors of finished outputs, so that an index in memory can be rebuilt.

Each output whose checkpoints others may start from has one small encrypted entry. `warm_starts` writes and reads them.
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
"""Most entries read when an index is rebuilt."""


@dataclass(frozen=True, slots=True)
class StoredVector:
    """The prompt vector of one output, and what the index must know of its checkpoints.

    Attributes:
        pipeline: digest of the pipeline whose encoder made the vector.
        num_bytes: total size of its checkpoints.
        owner: the properties by which purges find it.
    """

    name: CacheKeys
    pipeline: str
    vector: Floats
    num_steps: int
    num_bytes: int
    owner: EntryOwner


class Vectors:
    """Stores and reads prompt vectors."""

    def __init__(self, tiers: Tiers, ttl_s: float) -> None:
        self._tiers = tiers
        self._ttl_s = ttl_s

    async def keep(self, kept: StoredVector) -> None:
        """Stores the vector of an output."""
        facts = {"comparable": kept.name.comparable, "pipeline": kept.pipeline}
        facts |= {"steps": str(kept.num_steps), "bytes": str(kept.num_bytes)}
        data = np.asarray(kept.vector, np.float16).tobytes()
        entry = Entry(data, facts, kept.owner.revision, kept.owner.generation)
        await self._tiers.put(_key(kept.name.namespace, kept.name.exact), entry, self._ttl_s)

    async def forget(self, namespace: Namespace, exact: str) -> None:
        """Deletes the vector of an output."""
        await self._tiers.delete(_key(namespace, exact))

    async def all(self, namespace: Namespace, known: Container[str] = ()) -> AsyncIterator[StoredVector]:
        """Reads the vectors of a namespace, except those in `known`; at most `MAX_KEPT`."""
        prefix = _key(namespace, "")
        for key in await self._tiers.keys(prefix, MAX_KEPT):
            exact = key.removeprefix(prefix)
            kept = None if exact in known else await self.get(namespace, exact)
            if kept is not None and exact not in known:
                yield kept

    async def get(self, namespace: Namespace, exact: str) -> StoredVector | None:
        """Returns the vector of one output, or None."""
        found = await self._tiers.get(_key(namespace, exact))
        if found is None:
            return None
        at = found.entry.metadata
        comparable = at["comparable"]
        name = CacheKeys(namespace, exact, lambda: comparable)
        vector = np.frombuffer(found.entry.data, np.float16).astype(np.float32)
        owner = EntryOwner(f"{namespace.prefix}/", found.entry.revision, found.entry.generation)
        return StoredVector(name, at["pipeline"], vector, int(at["steps"]), int(at["bytes"]), owner)


def _key(namespace: Namespace, exact: str) -> str:
    return f"{namespace.prefix}/vector/{exact}"
