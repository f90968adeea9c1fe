"""Pictures of similar prompts: found by LSH and by a scan, checked by exact cosine, let through by the text guard.

LSH tables find what is near among very many; much below a cosine of 0.9 they
miss more and more, so a space's newest pictures are scanned too where the tables
give nothing.

Invariant: what is returned has the comparable name asked for (same model, size,
sampler, steps, guidance and negative prompt), at least the similarity asked
for, and a prompt that agrees with the one asked for. When a picture has answered
`max_uses` times, one like it is developed anew and takes its place as soon as it
is there, so that those who ask alike do not all see one picture, least of all
one that came out badly; until then it goes on answering, and where nothing came
of the new one, the next is begun after as many answers. Neighbours: `lsh`,
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
MAX_KNOWN = 100_000
"""Pictures whose prompts need not be looked up to know what they say, and whose uses are counted."""


@dataclass(frozen=True, slots=True)
class Similar:
    """A picture that may be served for another prompt.

    Attributes:
        name: the exact name of the picture.
        worn: it has answered often enough: this time one like it should be developed from noise, to be added in its
            place.
    """

    name: str
    kept: Kept
    similarity: float
    worn: bool = False


@dataclass(slots=True)
class _Known:
    """Of one picture: by what item it is found, what its prompt says, how often it was found on this replica."""

    item: str
    says: Facts
    num_uses: int = 0


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
        max_uses: how often a picture answers on one replica before one is to take its place.
        rejected: called for each candidate that the guard turns away.
    """

    def __init__(
        self, pictures: Pictures, store: BucketStore, max_scanned: int, max_uses: int, rejected: Callable[[], None]
    ) -> None:
        self._pictures = pictures
        self._store = store
        self._max_scanned = max_scanned
        self._max_uses = max_uses
        self._rejected = rejected
        self._indexes: OrderedDict[tuple[str, str], _Index] = OrderedDict()
        self._guards: dict[str, Guard] = {}
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def add(
        self, name: OutputName, pipeline: Pipeline, prompt: str, vector: Floats, owner: Owner, replaces: str | None
    ) -> None:
        """A finished picture is there for prompts like its own.

        Args:
            replaces: exact name of one that is found no more.
        """
        index, item = self._index(name.space, pipeline, len(vector)), _item(name, owner)
        earlier = self._known.get(name.exact)
        known = (earlier, None if replaces is None else self._known.get(replaces))
        gone = [one.item for one in known if one is not None and one.item != item]
        await index.tables.add(name.comparable, item, vector)
        index.newest.add(name.comparable, item, vector)
        for old in gone:
            await self._remove(old, name.space, pipeline)
        self._remember(item, self._guard(pipeline).facts(prompt), 0 if earlier is None else earlier.num_uses)

    async def forget(self, scope: Scope) -> bool:
        """Finds nothing any more of what was purged; False where the buckets could not be cleared."""
        done = await self._store.discard(lambda item: scope.includes(_owner(item)))
        for index in self._indexes.values():
            index.newest.discard(lambda item: scope.includes(_owner(item)))
        for exact in [exact for exact, known in self._known.items() if scope.includes(_owner(known.item))]:
            del self._known[exact]
        return done

    async def find(
        self,
        name: OutputName,
        pipeline: Pipeline,
        prompt: str,
        vector: Floats,
        min_similarity: float,
        encoding: PixelEncoding,
        taken: set[str],
    ) -> Similar | None:
        """The most similar picture that may answer `prompt`, if there is one.

        Args:
            taken: exact names of pictures that may not; what is found is added.
        """
        index, wanted = self._index(name.space, pipeline, len(vector)), self._guard(pipeline).facts(prompt)
        seen: set[str] = set()
        found = await index.tables.search(name.comparable, vector, min_similarity, NUM_CANDIDATES)
        if (similar := await self._choose(found, seen, taken, name, pipeline, wanted, encoding)) is not None:
            return similar
        found = index.newest.search(name.comparable, vector, min_similarity, NUM_CANDIDATES)
        return await self._choose(found, seen, taken, name, pipeline, wanted, encoding)

    async def _choose(
        self,
        found: Sequence[Match],
        seen: set[str],
        taken: set[str],
        name: OutputName,
        pipeline: Pipeline,
        wanted: Facts,
        encoding: PixelEncoding,
    ) -> Similar | None:
        for match in found:
            source = replace(name, exact=_exact(match.item))
            if source.exact in seen or source.exact in taken:
                continue
            seen.add(source.exact)
            known = await self._look_up(match.item, source, pipeline)
            if known is not None and known.says != wanted:
                self._rejected()
                continue
            kept = None if known is None else await self._pictures.get(source, encoding)
            if source.exact in taken:  # meanwhile, by another output of its request
                continue
            if known is not None and kept is not None:
                taken.add(source.exact)
                known.num_uses += 1
                worn = known.num_uses % (self._max_uses + 1) == 0
                return Similar(source.exact, kept, match.cosine, worn)
            if await self._pictures.gone(source):
                await self._remove(match.item, name.space, pipeline)
        return None

    async def _look_up(self, item: str, source: OutputName, pipeline: Pipeline) -> _Known | None:
        """What is known of a picture; None where it is gone."""
        if source.exact not in self._known:
            facts = await self._pictures.facts(source)
            if facts is None:
                return None
            self._remember(item, self._guard(pipeline).facts(facts.prompt))
        self._known.move_to_end(source.exact)
        return self._known[source.exact]

    def _remember(self, item: str, says: Facts, num_uses: int = 0) -> None:
        self._known[_exact(item)] = _Known(item, says, num_uses)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    async def _remove(self, item: str, space: Space, pipeline: Pipeline) -> None:
        await self._store.remove(item)
        self._known.pop(_exact(item), None)
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
