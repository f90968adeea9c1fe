"""Training data: specs by index, pictures drawn on demand, latents computed once and kept on disk.

Everything is a function of the recipe's seed and an index, so that a run can be
resumed anywhere and another machine draws the same pictures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.icons import Spec, caption, held_out, sample_spec
from training.icons.render import render
from training.latents import Projection
from training.recipe import Recipe

CHUNK = 500


def training_spec(recipe: Recipe, index: int) -> Spec:
    """The spec of training icon `index`; never a held-out triple."""
    rng = random.Random(f"icons/{recipe.seed}/{index}")
    while True:
        spec = sample_spec(rng)
        if not held_out(spec.object, spec.colour, spec.background):
            return spec


def pictures(recipe: Recipe, indices: range) -> npt.NDArray[np.uint8]:
    """Draws training icons, (N, S, S, 3) uint8."""
    return np.stack([render(training_spec(recipe, index), recipe.size_px) for index in indices])


def _encode(job: tuple[Recipe, Projection, int]) -> npt.NDArray[np.float16]:
    recipe, projection, start = job
    drawn = pictures(recipe, range(start, min(start + CHUNK, recipe.num_icons)))
    return projection.encode(drawn).astype(np.float16)


def draw_latents(recipe: Recipe, projection: Projection, path: Path, workers: int) -> None:
    """Draws all training icons and writes their latents (N, C, h, w) float16; if interrupted, it starts again."""
    starts = range(0, recipe.num_icons, CHUNK)
    with ProcessPoolExecutor(workers) as pool:
        parts = []
        for done, part in enumerate(pool.map(_encode, [(recipe, projection, start) for start in starts])):
            parts.append(part)
            if done % 20 == 0:
                print(f"drawing: {done * CHUNK}/{recipe.num_icons} icons", flush=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, np.concatenate(parts))
    partial.rename(path)


class Batches:
    """An endless series of batches, each (indices into the latents, captions).

    Step `n` of rank `r` always gives the same batch.
    """

    def __init__(self, recipe: Recipe, rank: int, world: int) -> None:
        self._recipe = recipe
        self._rank = rank
        self._world = world
        self._specs = [training_spec(recipe, index) for index in range(recipe.num_icons)]

    def at(self, step: int) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Icons without repetition within an epoch, each with a new wording; some with an empty caption."""
        recipe = self._recipe
        first = (step * self._world + self._rank) * recipe.batch_size
        picks = np.empty(recipe.batch_size, np.int64)
        for offset in range(recipe.batch_size):
            epoch, place = divmod(first + offset, recipe.num_icons)
            picks[offset] = self._order(epoch)[place]
        rng = random.Random(f"captions/{recipe.seed}/{step}/{self._rank}")
        captions = [
            "" if rng.random() < recipe.caption_dropout else caption(self._specs[index], rng) for index in picks
        ]
        return picks, captions

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._shuffled = np.random.default_rng([self._recipe.seed, epoch]).permutation(self._recipe.num_icons)
        return self._shuffled


def captions(recipe: Recipe, count: int) -> Iterator[str]:
    """Captions from which the tokenizer is built."""
    rng = random.Random(f"tokenizer/{recipe.seed}")
    for _ in range(count):
        yield caption(sample_spec(rng), rng)
