"""The linear encoder: orthonormal, of unit variance, and undone by its linear preview."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.data import pictures
from training.latents import Projection, fit
from training.recipe import RECIPE, Recipe

RECIPE_8 = replace(RECIPE, size_px=32, patch_px=8, latent_channels=12)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return pictures(RECIPE_8, range(200))


@pytest.fixture(scope="module")
def projection(images: np.ndarray) -> Projection:
    return fit(RECIPE_8, images)


def test_latents_have_unit_variance_and_falling_strength(projection: Projection, images: np.ndarray) -> None:
    latents = projection.encode(images)
    assert latents.shape == (200, 12, 4, 4)
    assert latents.var(axis=(0, 2, 3)).mean() == pytest.approx(1.0, abs=0.01)
    deviation = latents.std(axis=(0, 2, 3))
    assert (np.diff(deviation) < 0.01).all()


def test_the_basis_is_orthonormal(projection: Projection) -> None:
    np.testing.assert_allclose(projection.basis.T @ projection.basis, np.eye(12), atol=1e-5)


def test_the_linear_preview_at_full_size_undoes_the_encoder(images: np.ndarray) -> None:
    everything: Recipe = replace(RECIPE_8, patch_px=4, latent_channels=48)
    projection = fit(everything, images)
    weights, bias = projection.linear_preview(4)
    flat = projection.encode(images[:4]).transpose(0, 2, 3, 1) @ weights + bias
    pixels = flat.reshape(4, 8, 8, 3, 4, 4).transpose(0, 1, 4, 2, 5, 3).reshape(4, 32, 32, 3)
    np.testing.assert_allclose(pixels, images[:4] / 127.5 - 1, atol=1e-3)


def test_a_smaller_linear_preview_is_the_mean_of_the_full_one(projection: Projection) -> None:
    full, full_bias = projection.linear_preview(8)
    small, small_bias = projection.linear_preview(2)
    np.testing.assert_allclose(small.reshape(12, 3, 2, 2), full.reshape(12, 3, 2, 4, 2, 4).mean(axis=(3, 5)), atol=1e-6)
    np.testing.assert_allclose(small_bias, full_bias.reshape(3, 2, 4, 2, 4).mean(axis=(2, 4)).ravel(), atol=1e-6)
