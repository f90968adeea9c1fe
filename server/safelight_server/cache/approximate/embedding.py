"""A prompt as one vector: the mean of its hidden states, centred, of length one.

The text encoder's `pooled_output` is not used: where the pipeline was trained
without a contrastive loss nothing shaped it, and on `icons` its cosine hardly
tells objects apart (decision record 0009). The mean over the prompt's own
positions does. Centring takes away what all prompts have in common, so that
unrelated prompts are near cosine 0; the mean is that of the manifest's example
prompts, fixed per pipeline digest. Pure. Neighbours: `lsh`, `index`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_BLOCK = 256
"""Rows a product: larger ones wake the BLAS library's other threads, which spin and cost more than they save."""

EXAMPLE_PROMPTS = tuple(
    f"{subject}{manner}"
    for subject in (
        "a photo of a cat",
        "a portrait of an old man",
        "a red car in the street",
        "mountains at sunset",
        "a bowl of fruit on a table",
        "an oil painting of a ship",
        "a castle in the fog",
        "two children playing",
        "a city at night, neon lights",
        "a blue flower, macro",
    )
    for manner in ("", ", in winter", ", cartoon style", ", highly detailed", ", black and white", ", soft light")
)
"""For pipelines whose manifest has none of its own."""


def prompt_vector(hidden: npt.NDArray[np.floating], token_ids: Sequence[int], eos_id: int) -> Floats:
    """The mean of the hidden states between begin and end; of the end alone where there is no text.

    Args:
        hidden: (T, D), the encoder's `last_hidden_state` of one prompt.
        token_ids: (T,), begin, text, end, padding.
        eos_id: of the end token; padding may be the same.

    Returns:
        (D,) float32.
    """
    end = next((index for index, token in enumerate(token_ids) if index and token == eos_id), len(token_ids))
    part = hidden[1:end] if end > 1 else hidden[end : end + 1]
    mean: Floats = np.mean(part, axis=0, dtype=np.float32)
    return mean


def centred(vector: Floats, mean: Floats) -> Floats:
    """(..., D) less the mean, each of length 1; what equals the mean stays zero and is similar to nothing."""
    moved = vector - mean
    length = np.linalg.norm(moved, axis=-1, keepdims=True)
    return np.asarray(np.divide(moved, length, out=np.zeros_like(moved), where=length > 0), np.float32)


def cosines(stored: npt.NDArray[np.float16], vector: Floats) -> Floats:
    """Of unit vectors (N, D), kept as float16, and a unit vector (D,): (N,) float32, at most 1.

    A vector's cosine with itself is 1: float16 may lose up to 2^-11 of it, so that what is as near as that is 1.
    """
    wide = np.asarray(vector, np.float32)
    parts = [stored[start : start + _BLOCK].astype(np.float32) @ wide for start in range(0, len(stored), _BLOCK)]
    if not parts:
        return np.empty(0, np.float32)
    found = np.concatenate(parts)
    found[found > 1 - 2**-11] = 1
    return found
