"""Pictures of similar prompts: found by LSH, checked by exact cosine, let through by the text guard.

Invariant: what is returned has the comparable name asked for (same model, size,
sampler, steps, guidance and negative prompt), at least the similarity asked
for, and a prompt that agrees with the one asked for. Neighbours: `lsh`,
`guard`, `pictures`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from safelight_server.cache.embedding import Floats
from safelight_server.cache.guard import Guard
from safelight_server.cache.lsh import BucketStore, Signatures, SimilarIndex
from safelight_server.cache.pictures import Kept, Pictures
from safelight_server.cache.spaces import OutputName, Space
from safelight_server.cache.store.purge import Owner, Scope
from safelight_server.catalog import Pipeline
from safelight_server.request import PixelEncoding

MAX_INDEXES = 64
"""Planes kept at once, of spaces and pipelines; they are made again from their seed."""
NUM_CANDIDATES = 16


@dataclass(frozen=True, slots=True)
class Similar:
    """A picture that may be served for another prompt."""

    kept: Kept
    similarity: float


class SimilarPictures:
    """See the module.

    Args:
        store: of all spaces: names of items and buckets are secrets of theirs.
        rejected: called for each candidate that the guard turns away.
    """

    def __init__(self, pictures: Pictures, store: BucketStore, rejected: Callable[[], None]) -> None:
        self._pictures = pictures
        self._store = store
        self._rejected = rejected
        self._indexes: OrderedDict[tuple[str, str], SimilarIndex] = OrderedDict()
        self._guards: dict[str, Guard] = {}

    async def add(self, name: OutputName, pipeline: Pipeline, vector: Floats, owner: Owner) -> None:
        """A finished picture is there for prompts like its own."""
        await self._index(name.space, pipeline, len(vector)).add(name.comparable, _item(name, owner), vector)

    async def forget(self, scope: Scope) -> None:
        """Finds nothing any more of what was purged."""
        await self._store.discard(lambda item: scope.includes(_owner(item)))

    async def find(
        self,
        name: OutputName,
        pipeline: Pipeline,
        prompt: str,
        vector: Floats,
        min_similarity: float,
        encoding: PixelEncoding,
    ) -> Similar | None:
        """The most similar picture that may answer `prompt`, if there is one."""
        index, guard = self._index(name.space, pipeline, len(vector)), self._guard(pipeline)
        for match in await index.search(name.comparable, vector, min_similarity, NUM_CANDIDATES):
            source = replace(name, exact=_exact(match.item))
            facts = await self._pictures.facts(source)
            if facts is None:
                await index.remove(match.item)  # no tier has it any more
                continue
            if not guard.agree(prompt, facts.prompt):
                self._rejected()
                continue
            if (kept := await self._pictures.get(source, encoding)) is not None:
                return Similar(kept, match.cosine)
        return None

    def _index(self, space: Space, pipeline: Pipeline, dimension: int) -> SimilarIndex:
        at = (space.name, pipeline.digest)
        index = self._indexes.get(at)
        if index is None:
            seed = space.seed(f"planes {pipeline.digest}")
            index = self._indexes[at] = SimilarIndex(Signatures(dimension, seed), self._store)
        self._indexes.move_to_end(at)
        if len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)
        return index

    def _guard(self, pipeline: Pipeline) -> Guard:
        if pipeline.digest not in self._guards:
            self._guards[pipeline.digest] = Guard(pipeline.manifest.guard)
        return self._guards[pipeline.digest]


def _item(name: OutputName, owner: Owner) -> str:
    """An item tells its picture and whose it is, so that any store of buckets can purge."""
    return f"{name.exact} {owner.prefix} {owner.revision.hex()} {owner.generation.hex()}"


def _exact(item: str) -> str:
    return item.partition(" ")[0]


def _owner(item: str) -> Owner:
    _, prefix, revision, generation = item.split(" ")
    return Owner(prefix, bytes.fromhex(revision), bytes.fromhex(generation))
