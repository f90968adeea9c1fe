"""Fixed linear encoder from pictures to latents: principal components of pixel patches.

A learned encoder of this size loses colours (measured on the prototype). The
components of 16 x 16 patches need no training and keep what a small denoiser can
draw; a learned decoder restores the edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.recipe import Recipe

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Projection:
    """A linear map from pixels to latents and back.

    Attributes:
        mean: (3 * p * p,), the mean patch in [-1, 1].
        basis: (3 * p * p, C), orthonormal columns.
        scale: (C,), factors from components to latents: sd^-0.5, so that strong components stay stronger, normalized
            to unit variance over all.
        patch_px: edge of a patch, p.
    """

    mean: Floats
    basis: Floats
    scale: Floats
    patch_px: int

    def encode(self, images: npt.NDArray[np.uint8]) -> Floats:
        """Encodes (N, S, S, 3) uint8 to (N, C, S / p, S / p), at the denoiser's scale."""
        patches = _patches(images, self.patch_px)
        latents = (patches - self.mean) @ (self.basis * self.scale)
        return np.ascontiguousarray(latents.transpose(0, 3, 1, 2))

    def convolution(self, scaling_factor: float) -> tuple[Floats, Floats]:
        """`encode` as a convolution of a picture in [-1, 1] (3, S, S), to latents at the decoder's scale.

        Returns:
            weight (C, 3, p, p) and bias (C,).
        """
        columns = self.basis * self.scale / np.float32(scaling_factor)
        weight = columns.reshape(self.patch_px, self.patch_px, 3, -1).transpose(3, 2, 0, 1)
        return np.ascontiguousarray(weight), -(self.mean @ columns)

    def linear_preview(self, block: int) -> tuple[Floats, Floats]:
        """The best linear map from latents to pixels, averaged to `block` x `block` pixels for each latent pixel.

        Returns:
            weights (C, 3 * block * block), in the order channel, row, column, and bias (3 * block * block,); RGB in
            [-1, 1].
        """
        fine, step = self.patch_px, self.patch_px // block
        channels = len(self.scale)

        def shrink(pixels: Floats) -> Floats:
            grid = pixels.reshape(-1, block, step, block, step, 3).mean(axis=(2, 4))
            return np.ascontiguousarray(grid.transpose(0, 3, 1, 2)).reshape(len(pixels), -1)

        inverse = (self.basis / self.scale).T.reshape(channels, fine, fine, 3)
        return shrink(inverse.reshape(channels, -1)), shrink(self.mean.reshape(1, -1))[0]


def fit(recipe: Recipe, images: npt.NDArray[np.uint8]) -> Projection:
    """Fits a projection to the patches of (N, S, S, 3) uint8 images."""
    patches = _patches(images, recipe.patch_px).reshape(-1, 3 * recipe.patch_px**2)
    mean = patches.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov((patches - mean).T.astype(np.float64)))
    order = np.argsort(values)[::-1][: recipe.latent_channels]
    deviation = np.sqrt(values[order])
    scale = deviation**-0.5
    scale /= np.sqrt(np.mean((deviation * scale) ** 2))
    basis = vectors[:, order]
    basis = basis * np.where(basis.sum(axis=0) < 0, -1.0, 1.0)
    return Projection(mean.astype(np.float32), basis.astype(np.float32), scale.astype(np.float32), recipe.patch_px)


def _patches(images: npt.NDArray[np.uint8], patch_px: int) -> Floats:
    count, height, width, _ = images.shape
    pixels = images.astype(np.float32) / 127.5 - 1.0
    grid = pixels.reshape(count, height // patch_px, patch_px, width // patch_px, patch_px, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(count, height // patch_px, width // patch_px, -1)
