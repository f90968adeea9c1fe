"""Looks up cached pictures, latents and embeddings for an output, and keeps those that an execution makes.

    exact         the very picture
    approximate   a similar picture, or a latent to start from, as far as the request allows them
    embeddings    those of the output's prompts that are known already
    record        a `CacheRecorder` for one execution: embeddings, checkpoints, the picture

Invariants: what is approximate is neither found as exact nor started from, at most served as similar;
nothing here fails a request: a tier that cannot answer is a miss. Neighbours:
`generations.planner` asks, `generations.execution` reports.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace

import structlog

from safelight_server.cache.approximate.embedding import Floats
from safelight_server.cache.approximate.similar import SimilarPicture, SimilarPictures
from safelight_server.cache.approximate.warm_starts import WarmStart, WarmStarts
from safelight_server.cache.checkpoints import Checkpoints
from safelight_server.cache.namespaces import CacheKeys, Namespaces
from safelight_server.cache.pictures import CachedPicture, PictureFacts, Pictures, pointer
from safelight_server.cache.prompts import Prompts
from safelight_server.catalog.catalog import Pipeline
from safelight_server.domain.errors import UnavailableError
from safelight_server.domain.picture import FinishedPicture, Pixels
from safelight_server.domain.request import CacheMode, CachePolicy, PixelEncoding, Spec
from safelight_server.domain.tensors import FloatArray
from safelight_server.engine.latents import Snapshot
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.storage.purge import EntryOwner
from safelight_server.telemetry.metrics import CacheMetrics

log = structlog.get_logger(__name__)

MAX_WRITES = 1024
"""Writes under way at once; beyond, what would be kept is not."""


class Retention(enum.Enum):
    """What is kept of an execution.

    EVERYTHING: it began from noise.
    AS_SIMILAR: it began from a similar prompt's latent: its picture may be served as similar, and as nothing else.
    EMBEDDINGS: it began elsewhere.
    """

    EVERYTHING = "everything"
    AS_SIMILAR = "as similar"
    EMBEDDINGS = "embeddings"


@dataclass(slots=True)
class CacheQuery:
    """One output, as far as the cache must know it.

    Attributes:
        embedding: of its prompt, between looking for something similar and developing it.
        vector: what its prompt is compared by, once that was computed.
        replaces: exact name of a picture that has answered often enough, which this output is to take the place of.
        excluded: exact names of the outputs of its request, and of what these were found to be similar to or to begin
            from: its request's outputs have one set together, for no two of them may show the same picture.
    """

    name: CacheKeys
    pipeline: Pipeline
    spec: Spec
    encoding: PixelEncoding
    policy: CachePolicy
    generation: str
    embedding: FloatArray | None = None
    vector: Floats | None = None
    replaces: str | None = None
    excluded: set[str] = field(default_factory=set)

    @property
    def revision(self) -> str:
        """Of the model, as purges name it."""
        return self.spec.model_revision


class Cache:
    """All caches behind one face; see the module for its four questions.

    Args:
        shared: other replicas go on from checkpoints, so that they are written through to a shared tier.
    """

    def __init__(
        self,
        namespaces: Namespaces,
        pictures: Pictures,
        prompts: Prompts,
        checkpoints: Checkpoints,
        similar: SimilarPictures,
        warm_starts: WarmStarts,
        metrics: CacheMetrics,
        *,
        shared: bool = False,
    ) -> None:
        self.shared = shared
        self.pictures = pictures
        self.namespaces = namespaces
        self.checkpoints = checkpoints
        self._prompts = prompts
        self._similar = similar
        self._warm_starts = warm_starts
        self._metrics = metrics
        self._writes: set[asyncio.Task[None]] = set()

    # --- what was done ---

    async def exact(self, wanted: CacheQuery) -> CachedPicture | None:
        """The very picture."""
        began = time.perf_counter()
        kept = await self.pictures.get(wanted.name, wanted.encoding)
        self._metrics.looked("exact", time.perf_counter() - began)
        return kept

    async def approximate(self, wanted: CacheQuery) -> SimilarPicture | WarmStart | None:
        """A similar picture or a latent to start from, as far as the request allows them."""
        mode = wanted.policy.mode
        if mode not in (CacheMode.ALLOW_SIMILAR, CacheMode.ALLOW_LATENT):
            return None
        began = time.perf_counter()
        found = await self._approximate(wanted, pictures=mode is CacheMode.ALLOW_SIMILAR)
        self._metrics.looked("approximate", time.perf_counter() - began)
        return found

    async def _approximate(self, wanted: CacheQuery, *, pictures: bool) -> SimilarPicture | WarmStart | None:
        name, pipeline, spec = wanted.name, wanted.pipeline, wanted.spec
        try:
            embedding = await self._prompts.get(name.namespace, pipeline, spec.token_ids, self.owner(wanted))
            wanted.embedding = embedding
            vector = wanted.vector = await self._prompts.vector(pipeline, spec.token_ids, embedding)
        except UnavailableError:
            return None  # whatever ails the encoder, development will say it
        if pictures:
            similar = await self._similar.find(
                name, pipeline, spec.prompt, vector, wanted.policy.min_similarity, wanted.encoding, wanted.excluded
            )
            if similar is not None and similar.exhausted:
                wanted.replaces = similar.name
                return None
            if similar is not None:
                return similar
        return await self._warm_starts.find(name, pipeline, vector, spec.num_inference_steps, wanted.excluded)

    async def embeddings(self, wanted: CacheQuery) -> tuple[FloatArray | None, ...]:
        """Those of its prompts, row by row, that are known already."""
        namespace, pipeline, spec = wanted.name.namespace, wanted.pipeline, wanted.spec
        met, wanted.embedding = wanted.embedding, None  # not kept for as long as the output may wait
        return tuple(
            [
                met
                if met is not None and ids == spec.token_ids
                else await self._prompts.known(namespace, pipeline, ids)
                for ids in spec.token_ids_by_row
            ]
        )

    # --- what is done ---

    def record(self, wanted: CacheQuery, keep: Retention) -> CacheRecorder:
        """Keeps what an execution makes of an output."""
        return CacheRecorder(self, wanted, keep)

    async def keep_embedding(self, wanted: CacheQuery, token_ids: Sequence[int], embedding: FloatArray) -> None:
        """Keeps the embedding of one of its prompts."""
        kept = await self._prompts.keep(
            wanted.name.namespace, wanted.pipeline, token_ids, embedding, self.owner(wanted)
        )
        if kept and wanted.vector is None and token_ids == wanted.spec.token_ids:
            wanted.vector = await self._prompts.vector(wanted.pipeline, token_ids, embedding)

    async def keep_picture(
        self, wanted: CacheQuery, picture: FinishedPicture, compute_s: float, *, there: bool
    ) -> None:
        """Keeps a finished picture and makes it findable.

        Args:
            there: its pixels are kept already.
        """
        name, pipeline, spec = wanted.name, wanted.pipeline, wanted.spec
        steps = spec.num_inference_steps
        if not there:
            await self.pictures.keep(name, picture.pixels, facts_of(wanted, compute_s))
        await self.checkpoints.ended(name.namespace.name, name.exact, steps, self.owner(wanted))
        vector = await self._vector(wanted)
        if vector is not None:
            await self._similar.add(name, pipeline, spec.prompt, vector, self.owner(wanted), wanted.replaces)
            shape = pipeline.latent_shape(spec.width_px, spec.height_px)
            if num_bytes := self.checkpoints.policy.left_bytes(steps, shape):
                await self._warm_starts.add(name, pipeline, vector, self.owner(wanted), steps, num_bytes)

    async def keep_as_similar(self, wanted: CacheQuery, picture: FinishedPicture, compute_s: float) -> None:
        """Keeps a picture that began from another's latent under a name by which EXACT never finds it.

        Where replicas share what is similar, they must see the picture too.
        """
        name = replace(wanted.name, exact=f"{wanted.name.exact}.near")
        vector = await self._vector(wanted)
        if vector is not None:
            await self.pictures.put(pointer(name), picture.pixels, facts_of(wanted, compute_s), replicate=self.shared)
            await self._similar.add(
                name, wanted.pipeline, wanted.spec.prompt, vector, self.owner(wanted), wanted.replaces
            )

    async def replicate(
        self, wanted: CacheQuery, pointer: str, pixels: Pixels, compute_s: float, ttl_s: float | None
    ) -> bool:
        """Keeps the pixels of a finished picture under a key; whether other replicas see them.

        Args:
            ttl_s: how long; None: as all pictures.
        """
        return await self.pictures.put(pointer, pixels, facts_of(wanted, compute_s), replicate=True, ttl_s=ttl_s)

    async def _vector(self, wanted: CacheQuery) -> Floats | None:
        if wanted.vector is not None:
            return wanted.vector
        ids = wanted.spec.token_ids
        embedding = await self._prompts.known(wanted.name.namespace, wanted.pipeline, ids)
        return None if embedding is None else await self._prompts.vector(wanted.pipeline, ids, embedding)

    def owner(self, wanted: CacheQuery) -> EntryOwner:
        """What purges tell its entries by."""
        return self.namespaces.owner(wanted.name.namespace, wanted.revision, wanted.generation)

    def write(self, work: Coroutine[None, None, None]) -> None:
        """Does it off the request path, unless too much is under way."""
        if len(self._writes) >= MAX_WRITES:
            self._metrics.not_kept()
            work.close()
            return
        task = asyncio.create_task(work)
        self._writes.add(task)
        task.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writes.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("bug", exc_info=fault)

    async def close(self) -> None:
        """Waits for what is being written, and looks nothing more up."""
        while self._writes:
            await asyncio.wait(self._writes)
        await self._warm_starts.close()


def facts_of(wanted: CacheQuery, compute_s: float) -> PictureFacts:
    """What is kept beside the pixels of an output."""
    return PictureFacts(
        wanted.spec.prompt, wanted.generation, wanted.revision, wanted.spec.num_inference_steps, compute_s
    )


class CacheRecorder(ExecutionObserver):
    """What is kept of one execution. The picture last: whoever finds it finds all.

    Attributes:
        there: whoever developed the picture has kept its pixels.
    """

    def __init__(self, cache: Cache, wanted: CacheQuery, keep: Retention) -> None:
        self._cache = cache
        self._wanted = wanted
        self._what = keep
        self.there = False

    def encoded(self, row: int, embedding: FloatArray) -> None:
        """The embedding of one of its prompts was computed."""
        ids = self._wanted.spec.token_ids_by_row[row]
        self._cache.write(self._cache.keep_embedding(self._wanted, ids, embedding))

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the state after this step is worth keeping."""
        policy = self._cache.checkpoints.policy
        return self._what is Retention.EVERYTHING and policy.is_due(step, self._wanted.spec.num_inference_steps)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """The state after a step."""
        checkpoints, name = self._cache.checkpoints, self._wanted.name
        if checkpoints.holds:
            checkpoints.hold(name.namespace.name, name.exact, snapshot, self._cache.owner(self._wanted))
        else:
            self._cache.write(self._keep(snapshot))

    async def _keep(self, snapshot: Snapshot) -> None:
        name, spec = self._wanted.name, self._wanted.spec
        await self._cache.checkpoints.keep(
            name.namespace.name,
            name.exact,
            snapshot,
            spec.num_inference_steps,
            revision=self._wanted.revision,
            generation=self._wanted.generation,
            replicate=self._cache.shared,
        )

    async def keep(self, picture: FinishedPicture, compute_s: float) -> None:
        """The finished picture."""
        match self._what:
            case Retention.EVERYTHING:
                await self._cache.keep_picture(self._wanted, picture, compute_s, there=self.there)
            case Retention.AS_SIMILAR:
                await self._cache.keep_as_similar(self._wanted, picture, compute_s)
