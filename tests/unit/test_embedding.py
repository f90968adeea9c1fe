"""The vector of a prompt, computed from the positions of the prompt's own tokens."""

from __future__ import annotations

import numpy as np
import pytest
from safelight_server.cache.approximate.embedding import centred, cosines, prompt_vector

BOS, EOS = 0, 1


def hidden(*rows: float) -> np.ndarray:
    return np.array(rows, np.float32)[:, None] * np.ones((1, 3), np.float32)


def test_the_mean_is_of_the_text_alone():
    vector = prompt_vector(hidden(100, 2, 4, 50, 70, 70), (BOS, 8, 9, EOS, EOS, EOS), EOS)
    assert vector.tolist() == [3, 3, 3]
    assert vector.dtype == np.float32


def test_a_prompt_that_fills_the_context_has_no_padding():
    assert prompt_vector(hidden(100, 2, 6, 50), (BOS, 8, 9, EOS), EOS).tolist() == [4, 4, 4]
    assert prompt_vector(hidden(100, 2, 6), (BOS, 8, 9), EOS).tolist() == [4, 4, 4]


def test_an_empty_prompt_is_its_end():
    assert prompt_vector(hidden(100, 5, 70), (BOS, EOS, EOS), EOS).tolist() == [5, 5, 5]


def test_a_begin_that_is_also_the_end_does_not_count_as_end():
    assert prompt_vector(hidden(100, 2, 50), (EOS, 8, EOS), EOS).tolist() == [2, 2, 2]


def test_centred_vectors_have_length_one_but_for_the_mean_itself():
    mean = np.array([1, 2, 3], np.float32)
    rows = centred(np.stack([mean + np.array([3, 0, 4]), mean, mean - 1]).astype(np.float32), mean)
    assert rows[0] == pytest.approx([0.6, 0, 0.8])
    assert rows[1].tolist() == [0, 0, 0]
    assert np.linalg.norm(rows[2]) == pytest.approx(1)
    assert rows.dtype == np.float32


@pytest.mark.parametrize("dimension", [2, 3, 64, 768])
def test_what_is_kept_in_half_precision_has_cosine_one_with_itself_and_with_little_else(dimension):
    rng = np.random.default_rng(dimension)
    vectors = centred(rng.standard_normal((100, dimension)).astype(np.float32), np.zeros(dimension, np.float32))
    aside = np.linalg.qr(np.stack([vectors[0], rng.standard_normal(dimension)], axis=1))[0][:, 1]
    near = 0.999 * vectors[0] + np.sqrt(1 - 0.999**2) * aside
    assert [float(cosines(vector[None].astype(np.float16), vector)[0]) for vector in vectors] == [1.0] * 100
    assert cosines(near[None].astype(np.float16), vectors[0])[0] == pytest.approx(0.999, abs=5e-4)
    assert cosines(near[None].astype(np.float16), vectors[0])[0] < 1


def test_a_prompt_without_a_begin_token_counts_from_its_first():
    """As with T5, whose padding has an id of its own."""
    assert prompt_vector(hidden(2, 4, 50, 70), (8, 9, EOS, 0), EOS, 0).tolist() == [3, 3, 3]
    assert prompt_vector(hidden(5, 70, 70), (EOS, 0, 0), EOS, 0).tolist() == [5, 5, 5]


def test_a_template_before_a_prompt_does_not_count():
    """As with Z-Image: three tokens before the text, and the end token begins what is after it."""
    ids = (7, 8, 9, 5, 6, EOS, 9, 0, 0)
    assert prompt_vector(hidden(90, 90, 90, 2, 4, 50, 60, 0, 0), ids, EOS, 3).tolist() == [3, 3, 3]
