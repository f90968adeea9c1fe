"""Looks up cached pictures, latents and embeddings for an output, and stores those that an execution makes.

    exact         the picture with the same fingerprint
    approximate   a similar picture, or a latent to start from, if the request allows them
    embeddings    the cached embeddings of the output's prompts
    record        a `CacheRecorder`, which stores what one execution makes: embeddings, checkpoints, the picture

Invariants: a picture that began from another picture's latent is served only as SIMILAR, never as EXACT, and no output
starts from its latents. No failure here fails a request: a tier that fails is a miss. `generations.planner` calls the
lookups; `generations.execution` calls the recorder.
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
from safelight_server.cache.prompts import Prompts, TextChanges
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.errors import UnavailableError
from safelight_server.domain.picture import FinishedPicture, Pixels
from safelight_server.domain.request import CacheMode, CachePolicy, PixelEncoding, Spec
from safelight_server.domain.tensors import Embedding
from safelight_server.engine.latents import Snapshot
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.storage.purge import EntryOwner
from safelight_server.telemetry.metrics import CacheMetrics

log = structlog.get_logger(__name__)

MAX_WRITES = 1024
"""Most writes in progress at once; further entries are not stored."""
ENCODE_S = 30.0
"""Longest wait in seconds for the embedding by which a finished picture is found: a server that closes waits for it."""


class Retention(enum.Enum):
    """What the cache stores of an execution, by where the execution began.

    EVERYTHING: it began from noise.
    AS_SIMILAR: it began from a similar prompt's latent; its picture may be served only as SIMILAR.
    EMBEDDINGS: it began from anything else; only its prompts' embeddings are stored.
    """

    EVERYTHING = "everything"
    AS_SIMILAR = "as similar"
    EMBEDDINGS = "embeddings"


@dataclass(slots=True)
class CacheQuery:
    """One output to look up in the caches, with intermediate results of the lookups.

    Attributes:
        text_changes: its adapters that change the text encoder.
        embedding: the embedding of its prompt; set by `approximate` and handed over by `embeddings`.
        vector: its prompt vector, once computed; that of the prompt without adapters.
        replaces: exact name of a picture that was served as similar `max_uses` times; this output replaces it.
        excluded: exact names that must not answer this output: the outputs of its request, and the pictures and latents
            already found for them. All outputs of a request share one set, so that no two show the same picture.
    """

    name: CacheKeys
    pipeline: Pipeline
    spec: Spec
    encoding: PixelEncoding
    policy: CachePolicy
    generation: str
    text_changes: TextChanges = ()
    embedding: Embedding | None = None
    vector: Floats | None = None
    replaces: str | None = None
    excluded: set[str] = field(default_factory=set)

    @property
    def revision(self) -> str:
        """The model revision, by which purges find its entries."""
        return self.spec.model_revision


class Cache:
    """All caches of one replica.

    Args:
        shared: whether other replicas may resume from checkpoints, which are then written to a shared tier at once.
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

    # --- lookups ---

    async def exact(self, wanted: CacheQuery) -> CachedPicture | None:
        """Finds the picture with the same fingerprint, in the requested encoding."""
        began = time.perf_counter()
        kept = await self.pictures.get(wanted.name, wanted.encoding)
        self._metrics.looked("exact", time.perf_counter() - began)
        return kept

    async def approximate(self, wanted: CacheQuery, *, latents: bool = True) -> SimilarPicture | WarmStart | None:
        """Finds a similar picture, or else a latent to start from, if the request allows them.

        Args:
            latents: whether to look for latents too.
        """
        mode = wanted.policy.mode
        if mode not in (CacheMode.ALLOW_SIMILAR, CacheMode.ALLOW_LATENT):
            return None
        began = time.perf_counter()
        found = await self._approximate(wanted, pictures=mode is CacheMode.ALLOW_SIMILAR, latents=latents)
        self._metrics.looked("approximate", time.perf_counter() - began)
        return found

    async def _approximate(
        self, wanted: CacheQuery, *, pictures: bool, latents: bool
    ) -> SimilarPicture | WarmStart | None:
        name, pipeline, spec = wanted.name, wanted.pipeline, wanted.spec
        try:
            embedding = await self._prompts.get(name.namespace, pipeline, spec.token_ids, self.owner(wanted))
            wanted.embedding = None if wanted.text_changes else embedding
            vector = wanted.vector = await self._prompts.vector(pipeline, spec.token_ids, embedding)
        except UnavailableError:
            return None  # a broken text encoder is a miss here; the execution reports the error
        if pictures:
            similar = await self._similar.find(
                name, pipeline, spec.prompt, vector, wanted.policy.min_similarity, wanted.encoding, wanted.excluded
            )
            if similar is not None and similar.exhausted:
                wanted.replaces = similar.name
                return None
            if similar is not None:
                return similar
        if not latents:
            return None
        return await self._warm_starts.find(name, pipeline, vector, spec.num_inference_steps, wanted.excluded)

    async def embeddings(self, wanted: CacheQuery) -> tuple[Embedding | None, ...]:
        """Finds the embeddings of its prompts, one per row, and behind them that of its image prompt if it has one.

        Returns:
            None for each that is not cached.
        """
        namespace, pipeline, spec = wanted.name.namespace, wanted.pipeline, wanted.spec
        found, wanted.embedding = wanted.embedding, None  # freed now: the output may wait long in the queue
        embeddings = [
            found
            if found is not None and ids == spec.token_ids
            else await self._prompts.known(namespace, pipeline, ids, wanted.text_changes)
            for ids in spec.token_ids_by_row
        ]
        if spec.image_prompt:
            embeddings.append(await self._prompts.known_image(namespace, pipeline, spec.image_prompt))
        return tuple(embeddings)

    # --- writes ---

    def record(self, wanted: CacheQuery, keep: Retention) -> CacheRecorder:
        """Returns an observer that stores what an execution makes."""
        return CacheRecorder(self, wanted, keep)

    async def keep_embedding(self, wanted: CacheQuery, token_ids: Sequence[int], embedding: Embedding) -> None:
        """Stores the embedding of one of its prompts."""
        kept = await self._prompts.keep(
            wanted.name.namespace, wanted.pipeline, token_ids, embedding, self.owner(wanted), wanted.text_changes
        )
        if kept and not wanted.text_changes and wanted.vector is None and token_ids == wanted.spec.token_ids:
            wanted.vector = await self._prompts.vector(wanted.pipeline, token_ids, embedding)

    async def keep_image_prompt(self, wanted: CacheQuery, embedding: Embedding) -> None:
        """Stores the embedding of its image prompt."""
        await self._prompts.keep_image(
            wanted.name.namespace, wanted.pipeline, wanted.spec.image_prompt, embedding, self.owner(wanted)
        )

    async def keep_picture(
        self, wanted: CacheQuery, picture: FinishedPicture, compute_s: float, *, there: bool
    ) -> None:
        """Stores a finished picture and adds it to the indexes.

        Args:
            there: whether its pixels are stored already.
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
        """Stores a picture that began from another picture's latent, under a name that EXACT lookups never use.

        If replicas share the index of similar pictures, the picture is written to a shared tier too.
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
        """Stores the pixels of a finished picture in a shared tier. Returns whether other replicas can read them.

        Args:
            pointer: the store key.
            ttl_s: seconds until they expire; None: the default of pictures.
        """
        return await self.pictures.put(pointer, pixels, facts_of(wanted, compute_s), replicate=True, ttl_s=ttl_s)

    async def _vector(self, wanted: CacheQuery) -> Floats | None:
        if wanted.vector is not None:
            return wanted.vector
        namespace, pipeline, ids = wanted.name.namespace, wanted.pipeline, wanted.spec.token_ids
        try:
            if wanted.text_changes:  # then its own embedding is another one, and that of the prompt alone may be new
                async with asyncio.timeout(ENCODE_S):
                    embedding: Embedding | None = await self._prompts.get(namespace, pipeline, ids, self.owner(wanted))
            else:
                embedding = await self._prompts.known(namespace, pipeline, ids)
            return None if embedding is None else await self._prompts.vector(pipeline, ids, embedding)
        except (UnavailableError, TimeoutError):
            return None  # a broken text encoder; the picture is kept all the same, but not found as a similar one

    def owner(self, wanted: CacheQuery) -> EntryOwner:
        """Returns the owner by which purges find its entries."""
        return self.namespaces.owner(wanted.name.namespace, wanted.revision, wanted.generation)

    @property
    def num_writes(self) -> int:
        """Writes in the background that are in progress."""
        return len(self._writes)

    def write(self, work: Coroutine[None, None, None]) -> None:
        """Runs a write in the background, unless `MAX_WRITES` are in progress."""
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
        """Waits for all writes in progress and stops background lookups."""
        while self._writes:
            await asyncio.wait(self._writes)
        await self._warm_starts.close()


def facts_of(wanted: CacheQuery, compute_s: float) -> PictureFacts:
    """Returns the facts that are stored beside the pixels of an output."""
    spec = wanted.spec
    num_steps = spec.num_inference_steps - spec.first_step
    return PictureFacts(spec.prompt, wanted.generation, wanted.revision, num_steps, compute_s)


class CacheRecorder(ExecutionObserver):
    """Stores what one execution makes.

    Attributes:
        there: whether the pixels of the picture are stored already.
    """

    def __init__(self, cache: Cache, wanted: CacheQuery, keep: Retention) -> None:
        self._cache = cache
        self._wanted = wanted
        self._what = keep
        self.there = False

    def encoded(self, row: int, embedding: Embedding) -> None:
        """Stores the embedding of one of its prompts, or behind them of its image prompt."""
        rows = self._wanted.spec.token_ids_by_row
        if row < len(rows):
            self._cache.write(self._cache.keep_embedding(self._wanted, rows[row], embedding))
        else:
            self._cache.write(self._cache.keep_image_prompt(self._wanted, embedding))

    def wants_checkpoint(self, step: int) -> bool:
        """Returns whether to store the latent after this step."""
        policy = self._cache.checkpoints.policy
        return self._what is Retention.EVERYTHING and policy.is_due(step, self._wanted.spec.num_inference_steps)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Stores the latent after a step, or holds it until the execution ends."""
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
        """Stores the finished picture, as `Retention` says."""
        match self._what:
            case Retention.EVERYTHING:
                await self._cache.keep_picture(self._wanted, picture, compute_s, there=self.there)
            case Retention.AS_SIMILAR:
                await self._cache.keep_as_similar(self._wanted, picture, compute_s)
