"""Finds cached pictures of similar prompts, by LSH and by a scan, and checks them by exact cosine and the text guard.

LSH tables search very many pictures, but much below a cosine of 0.9 they miss more and more. If they find nothing, a
namespace's newest pictures are scanned.

Invariant: a returned picture has the requested comparable name (same model, size, sampler, steps, guidance and negative
prompt), at least the requested similarity, and a prompt that agrees with the requested one.

A picture that was served `max_uses` times is exhausted: the next similar request computes a new picture from noise,
which replaces it. So users with similar prompts do not all get one picture, which may be a bad one. The old picture is
served until the new one is finished. If that fails, another attempt follows after as many uses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from safelight_server.cache.approximate.embedding import Floats
from safelight_server.cache.approximate.guard import Guard, TextFacts
from safelight_server.cache.approximate.index import SketchIndex
from safelight_server.cache.approximate.lsh import BucketStore, Match, Signatures, SimilarIndex
from safelight_server.cache.namespaces import CacheKeys, Namespace
from safelight_server.cache.pictures import CachedPicture, Pictures
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.request import PixelEncoding
from safelight_server.storage.purge import EntryOwner, PurgeScope

MAX_INDEXES = 64
"""Most indexes in memory, by namespace and pipeline; hyperplanes are made again from their seed."""
NUM_CANDIDATES = 64
MAX_KNOWN = 100_000
"""Most pictures whose text facts are remembered and whose uses are counted."""


@dataclass(frozen=True, slots=True)
class SimilarPicture:
    """A picture that may be served for another prompt.

    Attributes:
        name: the exact name of the picture.
        exhausted: it was served `max_uses` times: the caller should compute a new picture from noise to replace it.
    """

    name: str
    kept: CachedPicture
    similarity: float
    exhausted: bool = False


@dataclass(slots=True)
class _IndexedPicture:
    """A picture in the indexes: its item, its prompt's facts, and how often this replica served it."""

    item: str
    says: TextFacts
    num_uses: int = 0


@dataclass(frozen=True, slots=True)
class _NamespaceIndex:
    """The indexes of one namespace and pipeline: LSH tables, and a scan of the newest pictures."""

    tables: SimilarIndex
    newest: SketchIndex


class SimilarPictures:
    """Finds and serves pictures of similar prompts.

    Args:
        store: the LSH buckets of all namespaces. Item and bucket names contain HMACs, so namespaces do not mix.
        max_scanned: most pictures per namespace and pipeline that are scanned, the newest.
        max_uses: how often one replica serves a picture before it is replaced.
        rejected: called for each candidate that the guard rejects.
    """

    def __init__(
        self, pictures: Pictures, store: BucketStore, max_scanned: int, max_uses: int, rejected: Callable[[], None]
    ) -> None:
        self._pictures = pictures
        self._store = store
        self._max_scanned = max_scanned
        self._max_uses = max_uses
        self._rejected = rejected
        self._indexes: OrderedDict[tuple[str, str], _NamespaceIndex] = OrderedDict()
        self._guards: dict[str, Guard] = {}
        self._known: OrderedDict[str, _IndexedPicture] = OrderedDict()

    async def add(
        self, name: CacheKeys, pipeline: Pipeline, prompt: str, vector: Floats, owner: EntryOwner, replaces: str | None
    ) -> None:
        """Adds a finished picture to the indexes.

        Args:
            replaces: exact name of a picture to remove from the indexes; None: none.
        """
        index, item = self._index(name.namespace, pipeline, len(vector)), _item(name, owner)
        earlier = self._known.get(name.exact)
        known = (earlier, None if replaces is None else self._known.get(replaces))
        gone = [indexed.item for indexed in known if indexed is not None and indexed.item != item]
        await index.tables.add(name.comparable, item, vector)
        index.newest.add(name.comparable, item, vector)
        for old in gone:
            await self._remove(old, name.namespace, pipeline)
        self._remember(item, self._guard(pipeline).facts(prompt), 0 if earlier is None else earlier.num_uses)

    async def forget(self, scope: PurgeScope) -> bool:
        """Removes purged pictures from the indexes. False if the buckets could not be cleared."""
        done = await self._store.discard(lambda item: scope.includes(_owner(item)))
        for index in self._indexes.values():
            index.newest.discard(lambda item: scope.includes(_owner(item)))
        for exact in [exact for exact, known in self._known.items() if scope.includes(_owner(known.item))]:
            del self._known[exact]
        return done

    async def find(
        self,
        name: CacheKeys,
        pipeline: Pipeline,
        prompt: str,
        vector: Floats,
        min_similarity: float,
        encoding: PixelEncoding,
        excluded: set[str],
    ) -> SimilarPicture | None:
        """Returns the most similar picture that may answer `prompt`, or None.

        Args:
            excluded: exact names of pictures that must not be returned; the returned picture is added.
        """
        index, wanted = self._index(name.namespace, pipeline, len(vector)), self._guard(pipeline).facts(prompt)
        seen: set[str] = set()
        found = await index.tables.search(name.comparable, vector, min_similarity, NUM_CANDIDATES)
        if (similar := await self._choose(found, seen, excluded, name, pipeline, wanted, encoding)) is not None:
            return similar
        found = index.newest.search(name.comparable, vector, min_similarity, NUM_CANDIDATES)
        return await self._choose(found, seen, excluded, name, pipeline, wanted, encoding)

    async def _choose(
        self,
        found: Sequence[Match],
        seen: set[str],
        excluded: set[str],
        name: CacheKeys,
        pipeline: Pipeline,
        wanted: TextFacts,
        encoding: PixelEncoding,
    ) -> SimilarPicture | None:
        for match in found:
            source = replace(name, exact=_exact(match.item))
            if source.exact in seen or source.exact in excluded:
                continue
            seen.add(source.exact)
            known = await self._look_up(match.item, source, pipeline)
            if known is not None and known.says != wanted:
                self._rejected()
                continue
            kept = None if known is None else await self._pictures.get(source, encoding)
            if source.exact in excluded:  # another output of the request took it during the await
                continue
            if known is not None and kept is not None:
                excluded.add(source.exact)
                known.num_uses += 1
                exhausted = known.num_uses % (self._max_uses + 1) == 0
                return SimilarPicture(source.exact, kept, match.cosine, exhausted)
            if await self._pictures.gone(source):
                await self._remove(match.item, name.namespace, pipeline)
        return None

    async def _look_up(self, item: str, source: CacheKeys, pipeline: Pipeline) -> _IndexedPicture | None:
        """Returns a picture's facts and uses, read from the cache if not remembered; None if the picture is gone."""
        if source.exact not in self._known:
            facts = await self._pictures.facts(source)
            if facts is None:
                return None
            self._remember(item, self._guard(pipeline).facts(facts.prompt))
        self._known.move_to_end(source.exact)
        return self._known[source.exact]

    def _remember(self, item: str, says: TextFacts, num_uses: int = 0) -> None:
        self._known[_exact(item)] = _IndexedPicture(item, says, num_uses)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    async def _remove(self, item: str, namespace: Namespace, pipeline: Pipeline) -> None:
        await self._store.remove(item)
        self._known.pop(_exact(item), None)
        if (index := self._indexes.get((namespace.name, pipeline.digest))) is not None:
            index.newest.remove(item)

    def _index(self, namespace: Namespace, pipeline: Pipeline, dimension: int) -> _NamespaceIndex:
        at = (namespace.name, pipeline.digest)
        index = self._indexes.get(at)
        if index is None:
            tables = SimilarIndex(Signatures(dimension, namespace.seed(f"planes {pipeline.digest}")), self._store)
            codes = namespace.seed(f"codes of pictures {pipeline.digest}")
            index = self._indexes[at] = _NamespaceIndex(
                tables, SketchIndex(dimension, codes, max_items=self._max_scanned)
            )
        self._indexes.move_to_end(at)
        if len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)
        return index

    def _guard(self, pipeline: Pipeline) -> Guard:
        if pipeline.digest not in self._guards:
            self._guards[pipeline.digest] = Guard(pipeline.manifest.guard)
        return self._guards[pipeline.digest]


def _item(name: CacheKeys, owner: EntryOwner) -> str:
    """Returns the item of a picture. It includes the owner, so that any bucket store can purge."""
    return f"{name.exact} {owner.prefix} {owner.revision.hex()} {owner.generation.hex()}"


def _exact(item: str) -> str:
    return item.partition(" ")[0]


def _owner(item: str) -> EntryOwner:
    _, prefix, revision, generation = item.split(" ")
    return EntryOwner(prefix, bytes.fromhex(revision), bytes.fromhex(generation))
