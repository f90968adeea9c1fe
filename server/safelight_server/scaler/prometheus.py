"""Reads the demand of a fleet from a Prometheus that scrapes its replicas."""

from __future__ import annotations

import math
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

from safelight_server.scaler.demand import Demand
from safelight_server.scaler.forecast import HISTORY_BINS, STEP_S

TIMEOUT_S = 10.0
LEFT = "sum by (class) (safelight_left_compute_seconds{%s})"
DUE = "sum by (within) (safelight_due_compute_seconds{%s})"
RATE = "sum(rate(safelight_requested_compute_seconds_total{%s}[%s]))"
LIVE = "sum(safelight_live_instances{%s})"


class PrometheusError(Exception):
    """Prometheus cannot be reached, or its response is an error; the message says why."""


class Prometheus:
    """A client of a Prometheus.

    Args:
        url: its URL, such as "http://prometheus:9090".
    """

    def __init__(self, url: str) -> None:
        self._http = httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S)
        self._url = url

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def demand(self, selector: str) -> Demand:
        """The present load of the replicas whose series match `selector`, such as `namespace="pictures"`; no forecast.

        Raises:
            PrometheusError: the query failed.
        """
        left = await self._by_label(LEFT % selector, "class")
        due = await self._by_label(DUE % selector, "within")
        rate = await self._by_label(RATE % (selector, "1m"), "")
        live = await self._by_label(LIVE % selector, "")
        return Demand(
            left_s=left,
            due_s={float(within): seconds for within, seconds in due.items()},
            rate=rate.get("", 0.0),
            live_instances=live.get("", 0.0),
        )

    async def history(self, selector: str, end: int) -> NDArray[np.float64]:
        """The demand of the last weeks, in seconds of compute a second.

        Args:
            end: number of the bin after the last one, counted from 1970; a bin has `STEP_S` seconds.

        Returns:
            (HISTORY_BINS,) means of bins; NaN where Prometheus has nothing.

        Raises:
            PrometheusError: the query failed.
        """
        first = end - HISTORY_BINS + 1  # the value at the end of a bin is the mean over it
        parameters = {
            "query": RATE % (selector, f"{STEP_S}s"),
            "start": first * STEP_S,
            "end": end * STEP_S,
            "step": STEP_S,
        }
        bins = np.full(HISTORY_BINS, np.nan)
        for series in await self._ask("query_range", parameters):
            for at, text in series["values"]:
                value = float(text)
                if math.isfinite(value):
                    bins[round(float(at) / STEP_S) - first] = value
        return bins

    async def _by_label(self, query: str, label: str) -> dict[str, float]:
        series = await self._ask("query", {"query": query})
        return {each["metric"].get(label, ""): float(each["value"][1]) for each in series}

    async def _ask(self, what: str, parameters: dict[str, Any]) -> list[Any]:
        try:
            response = await self._http.get(f"/api/v1/{what}", params=parameters)
            answer = response.json()
            if response.is_success:
                return list(answer["data"]["result"])
            raise PrometheusError(f"{self._url} refuses {parameters['query']}: {answer.get('error')}")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise PrometheusError(f"{self._url} cannot be reached: {error or type(error).__name__}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrometheusError(f"{self._url} does not answer like Prometheus") from error
