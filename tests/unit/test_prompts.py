"""Cached embeddings of prompts have all outputs of the text encoder that the denoiser needs, or are a miss."""

from __future__ import annotations

import numpy as np
import pytest
from safelight_server.cache.namespaces import Namespaces
from safelight_server.cache.prompts import Prompts
from safelight_server.catalog.manifest import STABLE_DIFFUSION_INPUTS
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.purge import EntryOwner
from safelight_server.storage.sealed import Sealer
from safelight_server.storage.tiers import Tier, Tiers

from tests.support import image_prompts
from tests.support.pipelines import MANIFEST, small_pipeline
from tests.support.stores import Numbers

TOKENS = (1, 4, 6, 2)
OWNER = EntryOwner("x/", bytes(8), bytes(8))
HIDDEN = np.arange(12, dtype=np.float32).reshape(4, 3)
POOLED = np.array([7, 8], np.float32)


@pytest.fixture
def cached(tmp_path):
    """The embeddings, the namespace of a tenant, and two pipelines with the same text encoder."""
    keyring = Keyring.random()
    tiers = Tiers([Tier(MemoryStore(1 << 20))], Sealer(keyring), Numbers().metrics)
    inputs = STABLE_DIFFUSION_INPUTS | {"text_embeds": "encoder:pooled_output"}
    pipelines = small_pipeline(tmp_path), small_pipeline(tmp_path, inputs=inputs)
    return Prompts(tiers, encode, lambda _: "n", 60.0), Namespaces(keyring, {}).of("ann"), *pipelines


async def encode(*_):
    raise AssertionError("it was cached")


async def test_an_embedding_comes_back_with_all_its_outputs(cached):
    prompts, namespace, _, both = cached
    embedding = {"last_hidden_state": HIDDEN, "pooled_output": POOLED}
    assert await prompts.keep(namespace, both, TOKENS, embedding, OWNER)
    found = await prompts.known(namespace, both, TOKENS)
    assert found is not None and found.keys() == embedding.keys()
    assert all(np.array_equal(found[name], embedding[name]) for name in embedding)
    assert not await prompts.keep(namespace, both, TOKENS, embedding | {"pooled_output": POOLED + np.inf}, OWNER)


async def test_an_embedding_that_lacks_an_output_is_a_miss(cached):
    prompts, namespace, plain, both = cached
    assert await prompts.keep(namespace, plain, TOKENS, {"last_hidden_state": HIDDEN}, OWNER)
    assert await prompts.known(namespace, both, TOKENS) is None
    found = await prompts.known(namespace, plain, TOKENS)
    assert found is not None and np.array_equal(found["last_hidden_state"], HIDDEN)


async def test_an_embedding_of_other_numerics_is_not_found(cached):
    """Otherwise pictures of this runtime would be computed with the bits of another."""
    prompts, namespace, plain, _ = cached
    assert await prompts.keep(namespace, plain, TOKENS, {"last_hidden_state": HIDDEN}, OWNER)
    others = Prompts(prompts._tiers, encode, lambda _: "other", 60.0)
    assert await others.known(namespace, plain, TOKENS) is None


async def test_an_embedding_of_an_image_prompt_is_known_by_the_picture_s_content(tmp_path, cached):
    prompts, namespace, *_ = cached
    pipeline = small_pipeline(tmp_path, components=MANIFEST["components"] | image_prompts.IMAGE_ENCODER)
    embedding = {"tokens": HIDDEN, "negative_tokens": -HIDDEN}
    assert await prompts.keep_image(namespace, pipeline, "ab" * 32, embedding, OWNER)
    found = await prompts.known_image(namespace, pipeline, "ab" * 32)
    assert found is not None and found.keys() == embedding.keys()
    assert all(np.array_equal(found[name], embedding[name]) for name in embedding)
    assert await prompts.known_image(namespace, pipeline, "cd" * 32) is None
    other = {"image_encoder": image_prompts.IMAGE_ENCODER["image_encoder"] | {"sha256": "1" * 64}}
    retrained = small_pipeline(tmp_path, components=MANIFEST["components"] | other)
    assert await prompts.known_image(namespace, retrained, "ab" * 32) is None
    others = Prompts(prompts._tiers, encode, lambda _: "other", 60.0)
    assert await others.known_image(namespace, pipeline, "ab" * 32) is None
    assert not await prompts.keep_image(namespace, pipeline, "ab" * 32, embedding | {"tokens": HIDDEN + np.nan}, OWNER)
