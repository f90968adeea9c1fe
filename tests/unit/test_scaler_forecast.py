"""Forecasts of demand."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from safelight_server.scaler.forecast import DAY, WEEK, Seasons, forecast, seasons

START = 5 * DAY + 7
"""Number of the first bin: not the beginning of a week."""


def demand(num_bins: int, start: int = START) -> np.ndarray:
    """A pattern of days and weeks without noise."""
    at = np.arange(start, start + num_bins)
    return (2 + np.sin(2 * np.pi * at / DAY)) * np.where(at // DAY % 7 >= 5, 3.0, 1.0)


@functools.cache
def known() -> tuple[np.ndarray, Seasons]:
    """Two weeks and a day of the pattern, and its seasons; a fit takes a second."""
    history = demand(2 * WEEK + DAY)
    found = seasons(history, START + len(history))
    assert found is not None
    return history, found


def test_seasons_are_found_and_the_next_half_hour_is_forecast():
    history, found = known()
    end = START + len(history)
    made = forecast(history, end, found)
    assert made is not None
    assert made.method == "seasons"
    assert [made.in_15_min, made.in_30_min] == pytest.approx(demand(2, end), rel=0.1)


def test_seasons_hold_for_later_histories_of_another_length():
    _, found = known()
    later = demand(WEEK + 50, START + 1000)
    end = START + 1000 + len(later)
    made = forecast(later, end, found)
    assert made is not None
    assert [made.in_15_min, made.in_30_min] == pytest.approx(demand(2, end), rel=0.1)


def test_a_load_that_has_doubled_today_is_forecast_to_stay():
    history, found = known()
    history = history.copy()
    history[-DAY // 2 :] *= 2
    made = forecast(history, START + len(history), found)
    assert made is not None
    assert made.in_15_min == pytest.approx(2 * demand(1, START + len(history))[0], rel=0.1)


def test_gaps_are_bridged():
    history, found = known()
    history = history.copy()
    history[-20:-17] = np.nan
    made = forecast(history, START + len(history), found)
    assert made is not None
    assert np.isfinite(made.highest)


def test_without_seasons_the_last_week_stands_in_and_without_that_nothing():
    history = demand(WEEK + 5)
    made = forecast(history, START + len(history), None)
    assert made is not None
    assert (made.method, made.in_15_min, made.in_30_min) == ("last week", history[5], history[6])
    assert forecast(history[:100], START, None) is None
    assert forecast(np.full(3 * WEEK, np.nan), START, None) is None


@pytest.mark.parametrize("history", [demand(WEEK), np.zeros(3 * WEEK), np.full(3 * WEEK, np.nan)])
def test_too_little_has_no_seasons(history):
    assert seasons(history, START) is None
