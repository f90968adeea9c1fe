"""Pictures of similar prompts: found by LSH and by a scan, checked by exact cosine, let through by the text guard.

LSH tables find what is near among very many; much below a cosine of 0.9 they
miss more and more, so a space's newest pictures are scanned too where the tables
give nothing.

Invariant: what is returned has the comparable name asked for (same model, size,
sampler, steps, guidance and negative prompt), at least the similarity asked
for, and a prompt that agrees with the one asked for. Neighbours: `lsh`,
`neighbours`, `guard`, `pictures`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from safelight_server.cache.embedding import Floats
from safelight_server.cache.guard import Facts, Guard
from safelight_server.cache.lsh import BucketStore, Match, Signatures, SimilarIndex
from safelight_server.cache.neighbours import Neighbours
from safelight_server.cache.pictures import Kept, Pictures
from safelight_server.cache.spaces import OutputName, Space
from safelight_server.cache.store.purge import Owner, Scope
from safelight_server.catalog import Pipeline
from safelight_server.request import PixelEncoding

MAX_INDEXES = 64
"""Planes kept at once, of spaces and pipelines; they are made again from their seed."""
NUM_CANDIDATES = 64
MAX_SAID = 100_000
"""Pictures whose prompts need not be looked up to know what they say."""


@dataclass(frozen=True, slots=True)
class Similar:
    """A picture that may be served for another prompt."""

    kept: Kept
    similarity: float


@dataclass(frozen=True, slots=True)
class _Index:
    """Of one space and pipeline."""

    tables: SimilarIndex
    newest: Neighbours


class SimilarPictures:
    """See the module.

    Args:
        store: of all spaces: names of items and buckets are secrets of theirs.
        max_scanned: a space's newest pictures that are scanned.
        rejected: called for each candidate that the guard turns away.
    """

    def __init__(self, pictures: Pictures, store: BucketStore, max_scanned: int, rejected: Callable[[], None]) -> None:
        self._pictures = pictures
        self._store = store
        self._max_scanned = max_scanned
        self._rejected = rejected
        self._indexes: OrderedDict[tuple[str, str], _Index] = OrderedDict()
        self._guards: dict[str, Guard] = {}
        self._said: OrderedDict[str, Facts] = OrderedDict()

    async def add(self, name: OutputName, pipeline: Pipeline, prompt: str, vector: Floats, owner: Owner) -> None:
        """A finished picture is there for prompts like its own."""
        index, item = self._index(name.space, pipeline, len(vector)), _item(name, owner)
        await index.tables.add(name.comparable, item, vector)
        index.newest.add(name.comparable, item, vector)
        self._remember(item, self._guard(pipeline).facts(prompt))

    async def forget(self, scope: Scope) -> bool:
        """Finds nothing any more of what was purged; False where the buckets could not be cleared."""
        done = await self._store.discard(lambda item: scope.includes(_owner(item)))
        for index in self._indexes.values():
            index.newest.discard(lambda item: scope.includes(_owner(item)))
        for item in [item for item in self._said if scope.includes(_owner(item))]:
            del self._said[item]
        return done

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
        index, wanted = self._index(name.space, pipeline, len(vector)), self._guard(pipeline).facts(prompt)
        seen: set[str] = set()
        found = await index.tables.search(name.comparable, vector, min_similarity, NUM_CANDIDATES)
        if (similar := await self._choose(found, seen, name, pipeline, wanted, encoding)) is not None:
            return similar
        found = index.newest.search(name.comparable, vector, min_similarity, NUM_CANDIDATES)
        return await self._choose(found, seen, name, pipeline, wanted, encoding)

    async def _choose(
        self,
        found: Sequence[Match],
        seen: set[str],
        name: OutputName,
        pipeline: Pipeline,
        wanted: Facts,
        encoding: PixelEncoding,
    ) -> Similar | None:
        for match in found:
            if match.item in seen:
                continue
            seen.add(match.item)
            source = replace(name, exact=_exact(match.item))
            says = await self._says(match.item, source, pipeline)
            if says is not None and says != wanted:
                self._rejected()
                continue
            kept = None if says is None else await self._pictures.get(source, encoding)
            if kept is not None:
                return Similar(kept, match.cosine)
            if await self._pictures.gone(source):
                await self._remove(match.item, name.space, pipeline)
        return None

    async def _says(self, item: str, source: OutputName, pipeline: Pipeline) -> Facts | None:
        """What the prompt of a picture says; None where the picture is gone."""
        says = self._said.get(item)
        if says is None:
            facts = await self._pictures.facts(source)
            if facts is None:
                return None
            says = self._guard(pipeline).facts(facts.prompt)
            self._remember(item, says)
        return says

    def _remember(self, item: str, says: Facts) -> None:
        self._said[item] = says
        if len(self._said) > MAX_SAID:
            self._said.popitem(last=False)

    async def _remove(self, item: str, space: Space, pipeline: Pipeline) -> None:
        await self._store.remove(item)
        self._said.pop(item, None)
        if (index := self._indexes.get((space.name, pipeline.digest))) is not None:
            index.newest.remove(item)

    def _index(self, space: Space, pipeline: Pipeline, dimension: int) -> _Index:
        at = (space.name, pipeline.digest)
        index = self._indexes.get(at)
        if index is None:
            tables = SimilarIndex(Signatures(dimension, space.seed(f"planes {pipeline.digest}")), self._store)
            codes = space.seed(f"codes of pictures {pipeline.digest}")
            index = self._indexes[at] = _Index(tables, Neighbours(dimension, codes, max_items=self._max_scanned))
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
