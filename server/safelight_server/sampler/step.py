"""One denoising step for a whole batch, and the noise it may need."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

INITIAL, STEP, POSTERIOR = 0, 1, 2
"""Noise streams of an output: for the first latent, for the steps, and for the encoding of its picture."""


def advance(
    x: Floats, prediction: Floats, denoised_previous: Floats, noise: Floats | None, coefficients: Floats
) -> tuple[Floats, Floats]:
    """The sampler's step: each row by its own coefficients, with the same bits in any batch at any position.

    Args:
        x: latents, (B, C, h, w) float32.
        prediction: the denoiser's prediction after guidance, (B, C, h, w).
        denoised_previous: `denoised` of the step before, finite, (B, C, h, w).
        noise: unit noise, (B, C, h, w); None when no row has d != 0.
        coefficients: (B, 6), columns a, b, c, d, e, f.

    Returns:
        x_next and denoised, (B, C, h, w) float32 each.
    """
    a, b, c, d, e, f = (column[:, None, None, None] for column in coefficients.T)
    denoised = e * x + f * prediction
    x_next = a * x + b * prediction + c * denoised_previous
    if noise is not None:
        x_next += d * noise
    x_next += 0.0  # turns -0.0 into 0.0: otherwise its sign would depend on whether another row has noise
    return x_next, denoised


def guide(cond: Floats, uncond: Floats, scale: Floats) -> Floats:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6): (B, C, h, w) twice and (B,) -> (B, C, h, w)."""
    return uncond + scale[:, None, None, None] * (cond - uncond)


def rescale(guided: Floats, cond: Floats, share: Floats) -> Floats:
    """Guidance rescale: gives each row back the contrast that guidance has changed (Lin et al. 2023, eq. 15 and 16).

    Args:
        guided: predictions after guidance, (B, C, h, w).
        cond: the conditional predictions, whose standard deviation is the aim, (B, C, h, w).
        share: (B,) how much of it, 0 (none) to 1: phi in the paper.
    """
    if not share.any():
        return guided
    factors = np.ones(len(share), np.float32)
    for row in np.flatnonzero(share):  # row by row: sums over several rows might round differently in other batches
        wanted, found = (float(values[row].astype(np.float64).std()) for values in (cond, guided))
        if found:  # a prediction without contrast has none to scale
            factors[row] = share[row] * (wanted / found) + (1 - share[row])
    scaled: Floats = guided * factors[:, None, None, None]
    return scaled


def noised(clean: Floats, noise: Floats, level: Floats) -> Floats:
    """A clean latent (C, h, w) with the noise of a step. `level` (2,) has the factors of signal and noise."""
    x: Floats = level[0] * clean + level[1] * noise
    return x


def keep_outside(x: Floats, kept: Floats, mask: Floats) -> Floats:
    """`x` where `mask` (h, w) is 1, `kept` where it is 0, and a mixture in between: (C, h, w) each."""
    return mask * x + (1 - mask) * kept


def gaussian(seed: int, stream: int, step: int, shape: tuple[int, ...]) -> Floats:
    """Unit noise that depends on the arguments alone: Philox, a counter-based generator (Salmon et al. 2011)."""
    philox = np.random.Philox(key=seed, counter=[0, 0, stream, step])
    return np.random.Generator(philox).standard_normal(shape, dtype=np.float32)
