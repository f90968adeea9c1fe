"""The users' prompts: lines of a file, some drawn far more often than others."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts.txt")


class Prompts:
    """Draws prompts by Zipf's law: the k-th line of a file is drawn with a weight of k to the minus `exponent`.

    Args:
        file: one prompt a line; blank lines are skipped.
        exponent: 0 draws all alike; people's requests are often near 1.
        num_seeds: number of pictures of one prompt: each request has a seed below this. 0: the server chooses the seed.

    Raises:
        ValueError: the file has no prompt, or a number is below 0.
    """

    def __init__(self, file: Path, exponent: float, num_seeds: int) -> None:
        self._prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        if not self._prompts:
            raise ValueError(f"{file} has no prompt: write one a line")
        if not 0 <= exponent < float("inf") or num_seeds < 0:
            raise ValueError("the exponent of Zipf's law and the number of seeds must be at least 0")
        weights = (rank**-exponent for rank in range(1, len(self._prompts) + 1))
        self._cumulative = list(itertools.accumulate(weights))
        self._num_seeds = num_seeds

    def draw(self, rng: random.Random) -> tuple[str, int | None]:
        """Draws a prompt and a seed for it."""
        [prompt] = rng.choices(self._prompts, cum_weights=self._cumulative)
        return prompt, rng.randrange(self._num_seeds) if self._num_seeds else None
