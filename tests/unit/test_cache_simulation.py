"""The simulation of the caches on a trace: hits, kept entries, and the bound on bytes."""

from __future__ import annotations

import numpy as np
from safelight_server.cache.approximate.eviction import LeastRecentlyUsed
from safelight_server.cache.approximate.guard import Guard

from load_tests.calibration.eviction import LATENT_BYTES, NUM_STEPS, PICTURE_BYTES, Replay, Result
from load_tests.calibration.trace import Action, Asked
from training.icons import Spec

ICON = Spec("potion", "red", "blue")
PROMPTS = {"a red potion": 0.0, "the red potion": 0.3, "a blue potion": 0.5, "a red sword": 1.6}
"""Prompts and their angles: cosines to the first are 1, 0.955, 0.878 and below 0."""


def replay(*asked: tuple[str, int | None], max_bytes: int = 10**9, **options: object) -> Result:
    requests = tuple(Asked(0.0, n, 0, Action.START, prompt, ICON, seed) for n, (prompt, seed) in enumerate(asked))
    angles = np.array([PROMPTS[prompt] for prompt, _ in asked])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    facts = [Guard().facts(prompt) for prompt, _ in asked]
    return Replay(LeastRecentlyUsed(max_bytes), **options).run(requests, vectors, facts)


def test_the_same_seed_is_exact_and_without_one_it_is_similar():
    result = replay(("a red potion", 1), ("a red potion", 1), ("a red potion", None), ("the red potion", 2))
    assert result.hits == {"miss": 1, "exact": 1, "similar": 2}
    assert result.saved == 3 / 4


def test_what_the_guard_tells_apart_starts_from_a_latent():
    result = replay(("a red potion", None), ("a blue potion", None), ("a red sword", None))
    assert result.hits == {"miss": 2, "latent": 1}
    assert result.steps["latent"] == NUM_STEPS * 0.3


def test_pictures_begun_from_a_latent_are_similar_sources_only_where_they_are_kept():
    asked = (("a red potion", None), ("a blue potion", 5), ("a blue potion", 5), ("a blue potion", 5))
    assert replay(*asked).hits == {"miss": 1, "latent": 1, "similar": 2}
    assert replay(*asked, keep_approximate=False).hits == {"miss": 1, "latent": 3}


def test_a_picture_that_has_answered_often_enough_is_developed_anew():
    asked = (("a red potion", None),) * 6
    assert replay(*asked, max_uses=2).hits == {"miss": 2, "similar": 4}
    assert replay(*asked).hits == {"miss": 1, "similar": 5}


def test_exact_only_is_exact_only():
    result = replay(("a red potion", 1), ("the red potion", 1), ("a red potion", 1), approximate=False)
    assert result.hits == {"miss": 2, "exact": 1}
    assert result.admitted_bytes == 2 * PICTURE_BYTES


def test_what_was_evicted_saves_nothing():
    most = PICTURE_BYTES + 5 * LATENT_BYTES
    result = replay(("a red potion", 1), ("a red sword", 1), ("a red potion", 1), max_bytes=most)
    assert result.hits == {"miss": 3}
