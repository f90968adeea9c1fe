"""Cached embeddings of prompts and image prompts for the denoiser, and prompt vectors for similarity search.

The engine encodes prompts that are not cached; `approximate.embedding` turns embeddings into vectors.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from safelight_server.cache import fingerprint
from safelight_server.cache.approximate.embedding import EXAMPLE_PROMPTS, Floats, centred, prompt_vector
from safelight_server.cache.fingerprint import IndexKind
from safelight_server.cache.namespaces import Namespace
from safelight_server.catalog.manifest import HIDDEN_STATE, IMAGE_PROMPT_OUTPUTS
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Embedding
from safelight_server.storage.purge import EntryOwner
from safelight_server.storage.sealed import Entry
from safelight_server.storage.tiers import Tiers

Encode = Callable[[Pipeline, Sequence[int]], Awaitable[Embedding]]
TextChanges = tuple[tuple[str, float], ...]
"""The adapters that change the text encoder for a prompt, each by the digest of its file and its factor."""


class Prompts:
    """Stores and reads prompt embeddings.

    Args:
        encode: runs the text encoder on token ids (T,); returns the embedding.
        numerics_id: of a model: what decides the bits of its embeddings beside its encoder and the tokens.
        ttl_s: seconds until an embedding expires.
    """

    def __init__(self, tiers: Tiers, encode: Encode, numerics_id: Callable[[str], str], ttl_s: float) -> None:
        self._tiers = tiers
        self._encode = encode
        self._numerics_id = numerics_id
        self._ttl_s = ttl_s
        self._means: dict[str, asyncio.Task[Floats]] = {}

    async def known(
        self, namespace: Namespace, pipeline: Pipeline, token_ids: Sequence[int], changes: TextChanges = ()
    ) -> Embedding | None:
        """Returns the cached embedding, or None."""
        found = await self._tiers.get(self._key(namespace, pipeline, token_ids, changes))
        return None if found is None else _parsed(found.entry, pipeline, len(token_ids))

    async def keep(
        self,
        namespace: Namespace,
        pipeline: Pipeline,
        token_ids: Sequence[int],
        embedding: Embedding,
        owner: EntryOwner,
        changes: TextChanges = (),
    ) -> bool:
        """Stores an embedding. False if it is not finite. Purges find it by `owner`."""
        key = self._key(namespace, pipeline, token_ids, changes)
        return await self._put(key, embedding, pipeline.embedding_outputs, owner)

    async def known_image(self, namespace: Namespace, pipeline: Pipeline, digest: str) -> Embedding | None:
        """Returns the cached embedding of an image prompt, a picture whose file has this SHA-256, or None."""
        found = await self._tiers.get(self._image_key(namespace, pipeline, digest))
        return None if found is None else _arrays(found.entry)

    async def keep_image(
        self, namespace: Namespace, pipeline: Pipeline, digest: str, embedding: Embedding, owner: EntryOwner
    ) -> bool:
        """Stores the embedding of an image prompt. False if it is not finite. Purges find it by `owner`."""
        return await self._put(self._image_key(namespace, pipeline, digest), embedding, IMAGE_PROMPT_OUTPUTS, owner)

    async def _put(self, key: str, embedding: Embedding, names: Sequence[str], owner: EntryOwner) -> bool:
        arrays = [np.ascontiguousarray(embedding[name], np.float32) for name in names]
        if not all(np.isfinite(array).all() for array in arrays):
            return False
        shapes = {name: list(array.shape) for name, array in zip(names, arrays, strict=True)}
        facts = {"shapes": json.dumps(shapes)} if len(shapes) > 1 else {}
        entry = Entry(b"".join(array.tobytes() for array in arrays), facts, owner.revision, owner.generation)
        await self._tiers.put(key, entry, self._ttl_s)
        return True

    async def get(
        self, namespace: Namespace, pipeline: Pipeline, token_ids: Sequence[int], owner: EntryOwner
    ) -> Embedding:
        """Returns the embedding without adapters, from the cache or else from the text encoder."""
        embedding = await self.known(namespace, pipeline, token_ids)
        if embedding is None:
            embedding = await self._encode(pipeline, token_ids)
            await self.keep(namespace, pipeline, token_ids, embedding, owner)
        return embedding

    async def vector(self, pipeline: Pipeline, token_ids: Sequence[int], embedding: Embedding) -> Floats:
        """Returns the prompt vector for similarity search: (D,) float32, centred, of length 1.

        Args:
            embedding: without adapters, as the mean is that of prompts without adapters.
        """
        if (task := self._means.get(pipeline.digest)) is None or (task.done() and task.exception() is not None):
            task = self._means[pipeline.digest] = asyncio.create_task(self._mean(pipeline))
        mean = await asyncio.shield(task)
        return centred(_vector(pipeline, token_ids, embedding), mean)

    async def _mean(self, pipeline: Pipeline) -> Floats:
        """Returns the mean vector of the pipeline's example prompts, which centring subtracts."""
        tokenizer = pipeline.tokenizer
        if tokenizer is None:
            raise ValueError(f"{pipeline.name} has no tokenizer")
        prompts = pipeline.manifest.example_prompts or EXAMPLE_PROMPTS
        tokens = [tokenizer.encode(prompt).ids for prompt in prompts]
        embeddings = await asyncio.gather(*(self._encode(pipeline, ids) for ids in tokens))
        vectors = [_vector(pipeline, ids, e) for e, ids in zip(embeddings, tokens, strict=True)]
        return np.asarray(np.mean(vectors, axis=0), np.float32)

    def _key(
        self, namespace: Namespace, pipeline: Pipeline, token_ids: Sequence[int], changes: TextChanges = ()
    ) -> str:
        encoder = pipeline.component_digest(Component.TEXT_ENCODER)
        what = fingerprint.embedding(encoder, self._numerics_id(pipeline.name), token_ids, changes)
        return f"{namespace.prefix}/prompt/{fingerprint.index_key(namespace.key, IndexKind.EMBEDDING, what)}"

    def _image_key(self, namespace: Namespace, pipeline: Pipeline, digest: str) -> str:
        encoder = pipeline.component_digest(Component.IMAGE_ENCODER)
        what = fingerprint.image_prompt(encoder, self._numerics_id(pipeline.name), digest)
        return f"{namespace.prefix}/prompt/{fingerprint.index_key(namespace.key, IndexKind.EMBEDDING, what)}"


def _vector(pipeline: Pipeline, token_ids: Sequence[int], embedding: Embedding) -> Floats:
    """The mean of the hidden states of the prompt's tokens; of several text encoders those of one."""
    start, at = pipeline.text_tokens
    own = token_ids[start : start + at.max_tokens]
    return prompt_vector(embedding[HIDDEN_STATE], own, at.eos_id, num_begin_tokens=at.num_begin_tokens)


def _parsed(entry: Entry, pipeline: Pipeline, num_tokens: int) -> Embedding | None:
    """The embedding of an entry; None if it lacks an output of the encoder that the pipeline now uses."""
    if "shapes" not in entry.metadata:
        embedding: Embedding = {HIDDEN_STATE: np.frombuffer(entry.data, np.float32).reshape(num_tokens, -1)}
    else:
        embedding = _arrays(entry)
    return embedding if embedding.keys() >= set(pipeline.embedding_outputs) else None


def _arrays(entry: Entry) -> Embedding:
    """The arrays of an entry that says their shapes."""
    flat, embedding, first = np.frombuffer(entry.data, np.float32), {}, 0
    for name, shape in json.loads(entry.metadata["shapes"]).items():
        embedding[name] = flat[first : first + math.prod(shape)].reshape(shape)
        first += math.prod(shape)
    return embedding
