"""Checks whether generated pictures are copies: measures how near each lies to the training drawings.

Pictures are compared as 32 x 32 colour pictures (Euclidean distance of
values in [0, 1]). Held-out drawings, which were not used for training, show how
near an independent picture comes by chance: the limit is defined so that 1 % of
them are nearer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.data import training_spec
from training.icons import Spec
from training.icons.render import render
from training.recipe import RECIPE

FEATURE_PX = 32
DRAWN_PX = 64
NUM_TRAINING = 20_000
PERCENTILE = 1
CHUNK = 64

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Nearness:
    """Distances to the nearest training drawing.

    Attributes:
        share_below: share of the pictures with a distance below `limit`.
        limit: first percentile of the held-out drawings' distances.
        median: median distance of the pictures.
        held_out_median: median distance of the held-out drawings.
    """

    share_below: float
    limit: float
    median: float
    held_out_median: float

    def rounded(self) -> dict[str, float]:
        """The values rounded, for a report."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def features(images: Iterable[npt.NDArray[np.uint8]]) -> Floats:
    """(S, S, 3) uint8 each -> (N, 32 * 32 * 3) in [0, 1]."""
    size = (FEATURE_PX, FEATURE_PX)
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)).ravel() for image in images]
    return np.stack(small).astype(np.float32) / 255


def nearest(queries: Floats, known: Floats) -> Floats:
    """Euclidean distance of each query to the nearest of `known`, (N,)."""
    squares = (known**2).sum(axis=1)
    found = np.empty(len(queries), np.float32)
    for at in range(0, len(queries), CHUNK):
        part = queries[at : at + CHUNK]
        distances = squares - 2 * part @ known.T + (part**2).sum(axis=1, keepdims=True)
        found[at : at + CHUNK] = np.sqrt(np.maximum(distances.min(axis=1), 0))
    return found


def nearness(
    pictures: Sequence[npt.NDArray[np.uint8]], held_out: Sequence[Spec], count: int = NUM_TRAINING
) -> Nearness:
    """Compares generated pictures with the first `count` icons of the training data."""
    known = features(_draw(training_spec(RECIPE, index) for index in range(count)))
    honest = nearest(features(_draw(held_out)), known)
    return compare(nearest(features(pictures), known), honest)


def compare(distances: Floats, honest: Floats) -> Nearness:
    """Compares the distances of pictures with those of held-out drawings."""
    limit = float(np.percentile(honest, PERCENTILE))
    return Nearness(float((distances < limit).mean()), limit, float(np.median(distances)), float(np.median(honest)))


def _draw(specs: Iterable[Spec]) -> Iterator[npt.NDArray[np.uint8]]:
    return (render(spec, DRAWN_PX) for spec in specs)
