"""Cached prompt embeddings for the denoiser, and prompt vectors for similarity search.

The engine encodes prompts that are not cached; `approximate.embedding` turns embeddings into vectors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from safelight_server.cache import fingerprint
from safelight_server.cache.approximate.embedding import EXAMPLE_PROMPTS, Floats, centred, prompt_vector
from safelight_server.cache.fingerprint import IndexKind
from safelight_server.cache.namespaces import Namespace
from safelight_server.catalog.catalog import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import FloatArray
from safelight_server.storage.purge import EntryOwner
from safelight_server.storage.sealed import Entry
from safelight_server.storage.tiers import Tiers

Encode = Callable[[Pipeline, Sequence[int]], Awaitable[FloatArray]]


class Prompts:
    """Stores and reads prompt embeddings.

    Args:
        encode: runs the text encoder on token ids (T,); returns the embedding (T, D).
        ttl_s: seconds until an embedding expires.
    """

    def __init__(self, tiers: Tiers, encode: Encode, ttl_s: float) -> None:
        self._tiers = tiers
        self._encode = encode
        self._ttl_s = ttl_s
        self._means: dict[str, asyncio.Task[Floats]] = {}

    async def known(self, namespace: Namespace, pipeline: Pipeline, token_ids: Sequence[int]) -> FloatArray | None:
        """Returns the cached embedding (T, D), or None."""
        found = await self._tiers.get(_key(namespace, pipeline, token_ids))
        if found is None:
            return None
        return np.frombuffer(found.entry.data, np.float32).reshape(len(token_ids), -1)

    async def keep(
        self,
        namespace: Namespace,
        pipeline: Pipeline,
        token_ids: Sequence[int],
        embedding: FloatArray,
        owner: EntryOwner,
    ) -> bool:
        """Stores an embedding (T, D). False if it is not finite. `owner`: by which purges find it."""
        if not np.isfinite(embedding).all():
            return False
        data = np.ascontiguousarray(embedding, np.float32).tobytes()
        entry = Entry(data, {}, owner.revision, owner.generation)
        await self._tiers.put(_key(namespace, pipeline, token_ids), entry, self._ttl_s)
        return True

    async def get(
        self, namespace: Namespace, pipeline: Pipeline, token_ids: Sequence[int], owner: EntryOwner
    ) -> FloatArray:
        """Returns the embedding (T, D), from the cache or else from the text encoder."""
        embedding = await self.known(namespace, pipeline, token_ids)
        if embedding is None:
            embedding = await self._encode(pipeline, token_ids)
            await self.keep(namespace, pipeline, token_ids, embedding, owner)
        return embedding

    async def vector(self, pipeline: Pipeline, token_ids: Sequence[int], embedding: FloatArray) -> Floats:
        """Returns the prompt vector for similarity search: (D,) float32, centred, of length 1."""
        if (task := self._means.get(pipeline.digest)) is None or (task.done() and task.exception() is not None):
            task = self._means[pipeline.digest] = asyncio.create_task(self._mean(pipeline))
        mean = await asyncio.shield(task)
        return centred(prompt_vector(embedding, token_ids, pipeline.manifest.tokenizer.eos_id), mean)

    async def _mean(self, pipeline: Pipeline) -> Floats:
        """Returns the mean vector of the pipeline's example prompts, which centring subtracts."""
        tokenizer = pipeline.tokenizer
        if tokenizer is None:
            raise ValueError(f"{pipeline.name} has no tokenizer")
        prompts = pipeline.manifest.example_prompts or EXAMPLE_PROMPTS
        tokens = [tokenizer.encode(prompt).ids for prompt in prompts]
        embeddings = await asyncio.gather(*(self._encode(pipeline, ids) for ids in tokens))
        eos_id = pipeline.manifest.tokenizer.eos_id
        vectors = [prompt_vector(e, ids, eos_id) for e, ids in zip(embeddings, tokens, strict=True)]
        return np.asarray(np.mean(vectors, axis=0), np.float32)


def _key(namespace: Namespace, pipeline: Pipeline, token_ids: Sequence[int]) -> str:
    encoder = pipeline.manifest.components[Component.TEXT_ENCODER].sha256
    name = fingerprint.index_key(namespace.key, IndexKind.EMBEDDING, fingerprint.embedding(encoder, token_ids))
    return f"{namespace.prefix}/prompt/{name}"
