"""Prompt vectors for similarity search: the mean of a prompt's hidden states, centred, of length 1.

The mean runs over the positions of the prompt's own tokens. The text encoder's `pooled_output` is not used: without a
contrastive loss in training its values mean little, and on `icons` its cosine hardly tells objects apart (decision
record 0009). Centring subtracts what all prompts have in common, so that unrelated prompts have a cosine near 0. The
subtracted mean is that of the manifest's example prompts, fixed per pipeline digest. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_BLOCK = 256
"""Rows per matrix product: larger ones start the BLAS library's other threads, which cost more than they save."""

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
"""Example prompts for pipelines whose manifest has none."""


def prompt_vector(
    hidden: npt.NDArray[np.floating], token_ids: Sequence[int], eos_id: int, num_begin_tokens: int = 1
) -> Floats:
    """Returns the mean of the hidden states between begin and end token; that of the end token if there is no text.

    Args:
        hidden: (T, D) or longer, the encoder's `last_hidden_state` of one prompt.
        token_ids: (T,): begin, text, end, padding.
        eos_id: id of the end token; padding may use the same id.
        num_begin_tokens: tokens before those of the text: 1, or 0 where there is no begin token, as for T5.

    Returns:
        (D,) float32.
    """
    first = num_begin_tokens
    ends = (index for index, token in enumerate(token_ids) if index >= first and token == eos_id)
    end = next(ends, len(token_ids))
    part = hidden[first:end] if end > first else hidden[end : end + 1]
    mean: Floats = np.mean(part, axis=0, dtype=np.float32)
    return mean


def centred(vector: Floats, mean: Floats) -> Floats:
    """Subtracts the mean from vectors (..., D) and scales each to length 1.

    A vector equal to the mean becomes zero, which is similar to nothing.
    """
    moved = vector - mean
    length = np.linalg.norm(moved, axis=-1, keepdims=True)
    return np.asarray(np.divide(moved, length, out=np.zeros_like(moved), where=length > 0), np.float32)


def cosines(stored: npt.NDArray[np.float16], vector: Floats) -> Floats:
    """Returns the cosines (N,) of stored unit vectors (N, D) with a unit vector (D,): float32, at most 1.

    Storing as float16 loses up to 2^-11 of a cosine. Cosines above 1 - 2^-11 are set to 1, so that the cosine of a
    vector with itself is 1.
    """
    wide = np.asarray(vector, np.float32)
    parts = [stored[start : start + _BLOCK].astype(np.float32) @ wide for start in range(0, len(stored), _BLOCK)]
    if not parts:
        return np.empty(0, np.float32)
    found = np.concatenate(parts)
    found[found > 1 - 2**-11] = 1
    return found
