"""Nearer neighbours never save fewer steps, and a warm start begins at a step that was kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.cache.approximate.skip_policy import SkipPolicy

COSINES = st.floats(-1, 1)
SHORT_OF_THE_SAME = st.floats(-1, 0.998)
STEPS = st.integers(1, 200)


@pytest.mark.parametrize(
    ("cosine", "step"),
    [(0.6499, 0), (0.65, 2), (0.7499, 2), (0.75, 4), (0.85, 6), (0.9, 8), (0.9499, 8), (0.95, 10), (0.9989, 10)],
)
def test_bands_of_twenty_steps(cosine, step):
    assert SkipPolicy().start_step(cosine, 20, range(21)) == step


@pytest.mark.parametrize("cosine", [0.999, 1.0, 1.0000001])
def test_the_latent_of_the_same_prompt_begins_nothing(cosine):
    """It would lead to the same picture for any seed."""
    assert SkipPolicy().start_step(cosine, 20, range(21)) == 0
    assert SkipPolicy().fraction(cosine) == 0


@given(low=SHORT_OF_THE_SAME, high=SHORT_OF_THE_SAME, steps=STEPS, kept=st.sets(st.integers(0, 200)))
def test_a_higher_cosine_never_starts_earlier(low, high, steps, kept):
    low, high = sorted((low, high))
    skip_policy = SkipPolicy()
    assert skip_policy.start_step(low, steps, kept) <= skip_policy.start_step(high, steps, kept)


@given(cosine=COSINES, steps=STEPS, kept=st.sets(st.integers(0, 200)))
def test_a_start_was_kept_is_within_the_band_and_leaves_a_step(cosine, steps, kept):
    skip_policy = SkipPolicy()
    start = skip_policy.start_step(cosine, steps, kept)
    assert start == 0 or start in kept
    assert start <= skip_policy.fraction(cosine) * steps + 1e-6
    assert start < steps


@given(steps=STEPS, cosine=COSINES)
def test_steps_worth_keeping_are_all_that_is_needed(steps, cosine):
    skip_policy = SkipPolicy()
    assert skip_policy.start_step(cosine, steps, skip_policy.steps(steps)) == skip_policy.start_step(
        cosine, steps, range(steps)
    )
    assert len(skip_policy.steps(steps)) <= len(skip_policy.fractions)


def test_fractions_of_steps_do_not_lose_a_step_to_rounding():
    assert SkipPolicy((0.5,), (0.29,)).start_step(0.9, 100, range(100)) == 29
    assert SkipPolicy((0.5,), (0.99,)).start_step(0.9, 1, range(2)) == 0


@pytest.mark.parametrize(
    ("thresholds", "fractions"),
    [((0.5,), (0.1, 0.2)), ((0.6, 0.5), (0.1, 0.2)), ((0.5, 0.6), (0.2, 0.1)), ((0.5,), (1.0,)), ((1.5,), (0.5,))],
)
def test_bands_that_are_none_are_refused(thresholds, fractions):
    with pytest.raises(ValueError):
        SkipPolicy(thresholds, fractions)
