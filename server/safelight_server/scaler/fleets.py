"""The need of each fleet now, with a forecast that is kept between calls."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from safelight_server.scaler.demand import Need, needed
from safelight_server.scaler.forecast import STEP_S, Forecast, Seasons, forecast, seasons
from safelight_server.scaler.prometheus import Prometheus, PrometheusError
from safelight_server.scaler.trigger import Trigger

log = structlog.get_logger(__name__)
REFIT_S = 86_400
MAX_FLEETS = 64
"""Forecasts are kept for so many fleets; the least recently used goes first."""


@dataclass(slots=True)
class _Fleet:
    """The forecast of one fleet.

    Attributes:
        end: the bin for which the forecast was made.
        made: the forecast.
        found: the seasons in its history.
        fitted_at: the bin at which the seasons were computed.
        fitting: the task that computes the seasons anew.
    """

    end: int = -1
    made: Forecast | None = None
    found: Seasons | None = None
    fitted_at: int = -REFIT_S
    fitting: asyncio.Task[None] | None = None


class Fleets:
    """Computes how many replicas fleets need.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, prometheus: Prometheus, clock: Callable[[], float] = time.time) -> None:
        self._prometheus = prometheus
        self._clock = clock
        self._kept: OrderedDict[str, _Fleet] = OrderedDict()

    async def need(self, trigger: Trigger) -> Need:
        """The need of a fleet now.

        Raises:
            PrometheusError: its load is unknown.
        """
        demand = await self._prometheus.demand(trigger.selector)
        if trigger.use_forecast and (made := await self._forecast(trigger.selector)) is not None:
            demand = replace(demand, forecast=made.highest)
        return needed(demand, trigger.policy)

    async def close(self) -> None:
        """Waits for the computations in progress."""
        fits = [kept.fitting for kept in self._kept.values() if kept.fitting is not None]
        await asyncio.gather(*fits, return_exceptions=True)

    async def _forecast(self, selector: str) -> Forecast | None:
        """The forecast of this quarter of an hour. While the seasons are being computed, it is made without them."""
        kept = self._kept.setdefault(selector, _Fleet())
        self._kept.move_to_end(selector)
        if len(self._kept) > MAX_FLEETS:
            self._kept.popitem(last=False)
        end = int(self._clock() // STEP_S)
        if kept.end == end:
            return kept.made
        try:
            history = await self._prometheus.history(selector, end)
        except PrometheusError as error:  # four weeks may be too much for Prometheus; the present load is still known
            log.warning("history_unknown", selector=selector, error=str(error))
            return None
        if (end - kept.fitted_at) * STEP_S >= REFIT_S and kept.fitting is None:
            kept.fitted_at = end

            async def fit() -> None:
                try:
                    kept.found = await asyncio.to_thread(seasons, history, end)
                    kept.end = -1  # forecast again, with the seasons
                except Exception:  # an error of the library; until the next fit last week is the forecast
                    log.exception("seasons_not_found", selector=selector)
                finally:
                    kept.fitting = None

            kept.fitting = asyncio.create_task(fit())
        kept.end, kept.made = end, forecast(history, end, kept.found)
        log.info("forecast", selector=selector, forecast=kept.made)
        return kept.made
