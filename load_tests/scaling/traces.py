"""Traces of demand over weeks: seconds of compute that are requested in a second, in ticks of ten seconds."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TICK_S = 10
DAY_TICKS = 86_400 // TICK_S
WEEK_TICKS = 7 * DAY_TICKS
REQUEST_S = 2.0
"""Compute of one request in seconds; the number of requests in a tick has a Poisson distribution."""


def generated(seed: int, num_weeks: int, mean: float = 6.0, launch: bool = True) -> NDArray[np.float64]:
    """Generates a daily and a weekly pattern, three times the load at weekends, noise that lasts hours, and a launch.

    The launch is on the Wednesday of the last week at 17:00: twelve times the load within ten minutes. Then it halves
    every 40 minutes.

    Returns:
        (ticks,) seconds of compute that are requested in a second.
    """
    rng = np.random.default_rng(seed)
    ticks = np.arange(num_weeks * WEEK_TICKS)
    hour, day = (ticks % DAY_TICKS) / (DAY_TICKS / 24), ticks // DAY_TICKS % 7
    daily = 1 + 0.7 * np.sin(2 * np.pi * (hour - 14) / 24) + 0.2 * np.sin(4 * np.pi * (hour - 20) / 24)
    weekend = np.where(day >= 5, 3.0, 1.0)
    drift = np.exp(0.1 * _slow_noise(rng, len(ticks)))
    rate = daily * weekend * drift
    rate *= mean / rate.mean()
    if launch:
        at = (num_weeks - 1) * WEEK_TICKS + 2 * DAY_TICKS + 17 * DAY_TICKS // 24
        since_min = (ticks - at) * TICK_S / 60
        surge = np.where(since_min < 10, since_min / 10, 0.5 ** ((since_min - 10) / 40))
        rate *= 1 + 11 * np.where(since_min > 0, surge, 0.0)
    return _arrivals(rng, rate)


def read(path: Path, mean: float = 6.0, seed: int = 0) -> NDArray[np.float64]:
    """Reads a CSV of `timestamp,value` at even intervals, such as nyc_taxi.csv of the Numenta Anomaly Benchmark.

    It is scaled to a mean and interpolated linearly, and arrivals are drawn from a Poisson distribution.
    """
    with path.open() as file:
        rows = list(csv.DictReader(file))
    values = np.array([float(row["value"]) for row in rows])
    first, second = (np.datetime64(row["timestamp"].replace(" ", "T")) for row in rows[:2])
    step_s = (second - first) / np.timedelta64(1, "s")
    ticks = np.arange(int(len(values) * step_s / TICK_S))
    rate = np.interp(ticks * TICK_S, np.arange(len(values)) * step_s, values)
    return _arrivals(np.random.default_rng(seed), rate * (mean / rate.mean()))


def bins(demand: NDArray[np.float64], step_s: int) -> NDArray[np.float64]:
    """Means over bins of `step_s`."""
    size = step_s // TICK_S
    return np.asarray(demand[: len(demand) // size * size].reshape(-1, size).mean(axis=1), dtype=np.float64)


def _arrivals(rng: np.random.Generator, rate: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rng.poisson(rate * TICK_S / REQUEST_S) * (REQUEST_S / TICK_S), dtype=np.float64)


def _slow_noise(rng: np.random.Generator, num_ticks: int, hours: float = 3.0) -> NDArray[np.float64]:
    """Noise of variance 1 whose autocorrelation decays within hours."""
    per = int(900 / TICK_S)
    keep = np.exp(-0.25 / hours)
    drawn = rng.normal(0, np.sqrt(1 - keep**2), -(-num_ticks // per))
    values: NDArray[np.float64] = np.fromiter(_summed(drawn, keep), dtype=np.float64, count=len(drawn))
    return np.asarray(np.repeat(values, per), dtype=np.float64)[:num_ticks]


def _summed(drawn: NDArray[np.float64], keep: float) -> Iterator[float]:
    value = 0.0
    for one in drawn:
        value = keep * value + float(one)
        yield value
