"""Synthetic traffic of seven weeks: a daily and a weekly pattern, and in the last two weeks incidents to detect.

The rate of requests is that of the hour (times 3 at weekends), times random factors of the week, the day, the hour and
the minute, times the factor of an event.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
WEEKS, TRAINED_WEEKS = 7, 5
BASE_PER_S = 2.0
WEEKEND = 3.0
LAUNCH = 12.0
SPREADS = {7 * DAY_S: 0.05, DAY_S: 0.1, HOUR_S: 0.1, MINUTE_S: 0.1}
"""Standard deviations of the logarithms of the factors for each week, day, hour and minute."""


@dataclass(frozen=True)
class TrafficEvent:
    """An incident: the factor of the traffic from `begin_s` to `end_s` after the first Monday."""

    name: str
    begin_s: int
    end_s: int
    factor: float


def at(week: int, day: int, hour: float) -> int:
    """Converts to seconds after the first Monday; weeks and days count from 0."""
    return int(((week * 7 + day) * 24 + hour) * HOUR_S)


EVENTS = (
    TrafficEvent("launch in the weeks that are learned from", at(4, 1, 15), at(4, 1, 17), LAUNCH),
    TrafficEvent("launch", at(5, 2, 10), at(5, 2, 12), LAUNCH),
    TrafficEvent("a client in a loop, at night", at(5, 3, 3), at(5, 3, 4), 5.0),
    TrafficEvent("half of the way in is lost, on a Saturday", at(5, 5, 14), at(5, 5, 16), 0.3),
    TrafficEvent("the way in is lost, at night", at(6, 1, 2), at(6, 1, 3), 0.05),
    TrafficEvent("the way in is lost, in the afternoon", at(6, 3, 15), at(6, 3, 16), 0.05),
    TrafficEvent("launch on a Sunday", at(6, 6, 15), at(6, 6, 17), LAUNCH),
)


def usual(second: int) -> float:
    """Requests a second without noise and events: lowest at 4:00, ten times as many at 16:00."""
    hour, day = second % DAY_S / HOUR_S, second // DAY_S % 7
    daily = 0.55 - 0.45 * math.cos(2 * math.pi * (hour - 4) / 24)
    return BASE_PER_S * daily * (WEEKEND if day >= 5 else 1.0)


def counts(seed: int) -> Iterator[tuple[int, int]]:
    """For each minute: seconds after the first Monday, and the number of requests until then."""
    chance = random.Random(seed)
    factors = dict.fromkeys(SPREADS, 1.0)
    total = 0
    for second in range(0, WEEKS * 7 * DAY_S, MINUTE_S):
        for period_s, spread in SPREADS.items():
            if second % period_s == 0:
                factors[period_s] = math.exp(chance.gauss(0, spread))
        rate = usual(second) * math.prod(factors.values())
        for event in EVENTS:
            if event.begin_s <= second < event.end_s:
                rate *= event.factor
        mean = rate * MINUTE_S
        total += max(0, round(chance.gauss(mean, math.sqrt(mean))))
        yield second, total
