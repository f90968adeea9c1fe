"""Decides how many denoising steps to skip when starting from a similar prompt's latent, by the cosine of the prompts.

The more similar two prompts are, the longer their denoising agrees, so the later a step one can start from the other's
latent: NIRVANA (Agarwal et al. 2024, arXiv 2312.04429, section 5). All pipelines share one set of thresholds and
fractions. All functions are pure.

Invariants: a higher cosine never skips fewer steps, except that the same prompt (`SkipPolicy.same`) skips none. A start
is always a step whose latent is stored, and leaves at least one step to compute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SkipPolicy:
    """Thresholds of the cosine, and the fraction of steps that may be skipped from each on.

    Attributes:
        thresholds: cosines, rising.
        fractions: of the number of steps, rising, each above 0 and below 1; one per threshold.
        same: from this cosine on, the prompts count as the same and nothing is skipped: the latent would lead to the
            picture that it was taken from, whatever the seed.

    Raises:
        ValueError: an attribute breaks these rules.
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
        """Returns the fraction of steps that may be skipped; 0 below the first threshold and for the same prompt."""
        if cosine >= self.same:
            return 0.0
        return max((f for t, f in zip(self.thresholds, self.fractions, strict=True) if cosine >= t), default=0.0)

    def steps(self, num_steps: int) -> tuple[int, ...]:
        """Returns the steps whose latents are worth storing: those from which a threshold allows a start."""
        return tuple(sorted({step for f in self.fractions if (step := _last_step(f, num_steps)) > 0}))

    def start_step(self, cosine: float, num_steps: int, available_steps: Iterable[int]) -> int:
        """Returns the number of steps to skip.

        Args:
            cosine: of the two prompts' embeddings.
            num_steps: of the new generation; that of the similar one must be equal.
            available_steps: the steps after which the similar generation's latent was stored.

        Returns:
            The last available step that the cosine allows; 0: start from noise.
        """
        most = _last_step(self.fraction(cosine), num_steps)
        return max((step for step in available_steps if 0 < step <= most), default=0)


def _last_step(fraction: float, num_steps: int) -> int:
    """Returns the whole steps in a fraction. 1e-9 makes up for rounding: 0.29 * 100 must give 29."""
    return min(math.floor(fraction * num_steps + 1e-9), num_steps - 1)


def _rising(values: tuple[float, ...]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))
