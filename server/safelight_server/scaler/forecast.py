"""Forecasts the demand some minutes ahead, from weeks of history.

The history is split into a daily season, a weekly season, and the rest (MSTL;
Bandara, Hyndman and Bergmeir 2021, arXiv:2107.13462). This is done on a logarithmic
scale, since busy hours differ from quiet ones by a factor. The rest changes slowly, so
its present level, by exponential smoothing, is its forecast. With less than two weeks
of usable history the demand at the same time last week is the forecast; without that
there is none.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from statsmodels.tsa.seasonal import MSTL

STEP_S = 900
"""Length of a bin of the history."""
DAY, WEEK = 86_400 // STEP_S, 7 * 86_400 // STEP_S
HISTORY_BINS = 4 * WEEK
MIN_BINS = 2 * WEEK + DAY
LEVEL_WEIGHT = 0.5
"""Weight of the newest bin in the level."""
_WEIGHTS = LEVEL_WEIGHT * (1 - LEVEL_WEIGHT) ** np.arange(DAY) / (1 - (1 - LEVEL_WEIGHT) ** DAY)
"""Weights of the last day's bins, the newest first; their sum is 1."""
FLOOR = 1e-3
"""Added before the logarithm, as a share of the mean, since a bin may be 0."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Demand at coming moments, in seconds of compute a second.

    Attributes:
        in_15_min, in_30_min: mean over the bin that ends then.
        method: `seasons` or `last week`.
    """

    in_15_min: float
    in_30_min: float
    method: str

    @property
    def highest(self) -> float:
        """The highest of the moments."""
        return max(self.in_15_min, self.in_30_min)


@dataclass(frozen=True, slots=True)
class Seasons:
    """The seasons of a history: what each bin of the week adds to the level, on the logarithmic scale.

    Attributes:
        week: (WEEK,), by the number of the bin modulo WEEK.
        floor: the amount that was added before the logarithm.
    """

    week: NDArray[np.float64]
    floor: float


def seasons(history: NDArray[np.float64], end: int) -> Seasons | None:
    """Computes the seasons of a history. Takes seconds, so it is done about once a day.

    Args:
        history: (n,) mean demand of bins of `STEP_S`, the oldest first; NaN for unknown bins.
        end: number of the bin after the last one, counted from any fixed time.

    Returns:
        None if the history is too short or has no demand.
    """
    known = _filled(history)
    if len(known) < MIN_BINS or not known.max() > 0:
        return None
    floor = FLOOR * float(known.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = MSTL(np.log(known + floor), periods=(DAY, WEEK)).fit()
    return Seasons(np.roll(np.asarray(parts.seasonal).sum(axis=1)[-WEEK:], end % WEEK), floor)


def forecast(history: NDArray[np.float64], end: int, found: Seasons | None) -> Forecast | None:
    """The demand in the two bins of 15 minutes that follow a history; None: it is too short.

    Args:
        history, end: as in `seasons`.
        found: the seasons; None: they are unknown.
    """
    known = _filled(history)
    if found is not None and len(known) >= DAY:
        numbers = np.arange(end - 1, end - 1 - DAY, -1)
        rest = np.log(known[: -1 - DAY : -1] + found.floor) - found.week[numbers % WEEK]
        level = float(_WEIGHTS @ rest)
        ahead = [float(np.exp(level + found.week[(end + k) % WEEK])) - found.floor for k in (0, 1)]
        return Forecast(max(0.0, ahead[0]), max(0.0, ahead[1]), "seasons")
    if len(known) >= WEEK:
        return Forecast(float(known[-WEEK]), float(known[1 - WEEK]), "last week")
    return None


def _filled(history: NDArray[np.float64]) -> NDArray[np.float64]:
    """The history from its first known bin on, with gaps bridged by straight lines."""
    known = np.flatnonzero(np.isfinite(history))
    if len(known) == 0:
        return np.zeros(0)
    whole = np.interp(np.arange(len(history)), known, history[known])
    return np.asarray(np.maximum(whole[known[0] :], 0.0), dtype=np.float64)
