"""Measures of pictures: the distance of two, and the sharpness, colourfulness and lightness of one. Pure.

docs/operations/watching.md has the formulas and units for operators.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
FloatPixels = npt.NDArray[np.float32]

EDGE_PX = 32
"""Edge of a thumbnail, as for recognisable previews (docs/load-testing.md)."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the luma of Rec. 601."""


def thumbnail(pixels: Pixels) -> Pixels:
    """Scales a picture (H, W, 3) uint8 to (EDGE_PX, EDGE_PX, 3); each pixel is the mean of its area."""
    return np.asarray(Image.fromarray(pixels).resize((EDGE_PX, EDGE_PX), Image.Resampling.BOX))


def distances(one: Pixels, others: Pixels) -> npt.NDArray[np.float64]:
    """Distances of a thumbnail (h, w, 3) uint8 to N others (N, h, w, 3).

    Returns:
        (N,): mean absolute difference over pixels and channels; 0 for equal thumbnails, 1 for black and white.
    """
    difference = np.maximum(others, one) - np.minimum(others, one)  # in bytes: takes a quarter of the time of floats
    means: npt.NDArray[np.float64] = difference.reshape(len(others), -1).mean(axis=1)
    return means / 255


def luma(pixels: Pixels) -> FloatPixels:
    """The luma (H, W) of a picture (H, W, 3), from 0 to 255."""
    return pixels.astype(np.float32) @ LUMA


def sharpness(light: FloatPixels) -> float:
    """The variance of the Laplacian of a luma (H, W), in squared levels of 255; 0 below 3x3 pixels.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.
    """
    if min(light.shape) < 3:
        return 0.0
    inner = light[1:-1, 1:-1]
    laplacian = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * inner
    return float(laplacian.var())


def colourfulness(pixels: Pixels) -> float:
    """The colourfulness M of a picture (H, W, 3): 0 for grey, above 60 for a quite colourful picture.

    Hasler and Süsstrunk, "Measuring colourfulness in natural images", SPIE 5007, 2003.
    """
    red, green, blue = np.moveaxis(pixels.astype(np.float32), -1, 0)
    first, second = red - green, (red + green) / 2 - blue
    spread = float(np.hypot(first.std(), second.std()))
    return spread + 0.3 * float(np.hypot(first.mean(), second.mean()))
