"""How many denoising steps the latent of a similar prompt saves, by the cosine of the two prompts.

The nearer two prompts are, the later in the denoising they still agree, so the
later one can start from the other's latent: NIRVANA (Agarwal et al. 2024,
arXiv 2312.04429, section 5). Pure. One set of thresholds and
fractions serves all pipelines. Invariant: a higher cosine never starts earlier, short of that of
the same prompt, which never starts at all; a start is always a step that was
kept and always leaves at least one step to do. Neighbours: `index`
measures the cosine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SkipPolicy:
    """From each threshold on, that fraction of the steps is skipped.

    Attributes:
        thresholds: cosines, rising.
        fractions: of the number of steps, rising, each above 0 and below 1; one per threshold.
        same: from this cosine on it is the same prompt. Its latent would lead to the very picture that it was taken
            from, whatever the seed: nothing is skipped.

    Raises:
        ValueError: they are not so.
    """

    thresholds: tuple[float, ...] = (0.65, 0.75, 0.85, 0.90, 0.95)
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    same: float = 0.999

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.fractions):
            raise ValueError("there must be one fraction per threshold")
        if not all(-1 <= threshold <= 1 for threshold in self.thresholds) or not _rising(self.thresholds):
            raise ValueError("thresholds must be cosines, each above the one before")
        if not all(0 < fraction < 1 for fraction in self.fractions) or not _rising(self.fractions):
            raise ValueError("fractions must be above 0 and below 1, each above the one before")

    def fraction(self, cosine: float) -> float:
        """Of the steps that may be skipped at this cosine; 0 below the first threshold, and for the same prompt."""
        if cosine >= self.same:
            return 0.0
        return max((f for t, f in zip(self.thresholds, self.fractions, strict=True) if cosine >= t), default=0.0)

    def steps(self, num_steps: int) -> tuple[int, ...]:
        """The steps at which a latent is worth keeping: where a threshold allows to start."""
        return tuple(sorted({step for f in self.fractions if (step := _last_step(f, num_steps)) > 0}))

    def start_step(self, cosine: float, num_steps: int, available_steps: Iterable[int]) -> int:
        """The number of steps done with which to start.

        Args:
            cosine: of the two prompts' embeddings.
            num_steps: of the new generation; the neighbour's must be the same.
            available_steps: after how many steps the neighbour's latent was kept.

        Returns:
            The last that is available and not beyond what the cosine allows; 0: start from noise.
        """
        most = _last_step(self.fraction(cosine), num_steps)
        return max((step for step in available_steps if 0 < step <= most), default=0)


def _last_step(fraction: float, num_steps: int) -> int:
    """Whole steps in a fraction of them; a hair is allowed for, as 0.3 * 10 is 3 and 0.29 * 100 is 29."""
    return min(math.floor(fraction * num_steps + 1e-9), num_steps - 1)


def _rising(values: tuple[float, ...]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))
