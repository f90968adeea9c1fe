"""Load generators for Safelight and its peers: a closed loop for capacity, an open loop (Poisson) for latency.

Open loop: the next request is sent when it is due, whether or not the server has
caught up, and its latency counts from the moment it was due. This avoids what Tene
calls coordinated omission. Invariant: equal plans give equal arrivals, scaled by the
rate, for every server measured.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from load_tests.bench.requests import NoPicture, Seen

Ask = Callable[[int], Awaitable[Seen]]
"""Requests the picture of a seed; raises NoPicture if the server does not return one."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies in seconds from when each request was due, for requests that got their picture."""

    first_pixel_s: list[float]
    picture_s: list[float]
    num_failed: int


async def capacity(ask: Ask, num_clients: int, seconds: float) -> float:
    """Pictures per second of `num_clients` clients that request one after another; the first of each is warm-up."""
    seeds = itertools.count()
    finished: list[float] = []

    async def client(until: float) -> None:
        while time.perf_counter() < until:
            finished.append((await ask(next(seeds))).picture)

    await asyncio.gather(*(ask(next(seeds)) for _ in range(num_clients)))
    began = time.perf_counter()
    await asyncio.gather(*(client(began + seconds) for _ in range(num_clients)))
    counted = [at for at in finished if at <= began + seconds] or finished  # without the end, when clients idle
    return len(counted) / (max(counted) - began)


def schedule(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of Poisson arrivals at `rate` a second, from 0; at least one."""
    gaps = np.random.default_rng(seed).exponential(1.0, 2 * int(rate * seconds) + 64) / rate
    due = np.cumsum(gaps)
    return [float(due[0]), *(float(at) for at in due[1:] if at < seconds)]


async def poisson(ask: Ask, rate: float, seconds: float, seed: int) -> Latencies:
    """Sends requests at Poisson arrivals, and waits for those still running at the end."""
    latencies = Latencies([], [], 0)
    began = time.perf_counter()
    due = schedule(rate, seconds, seed)
    outcomes = await asyncio.gather(*(_at(ask, began + at, number) for number, at in enumerate(due)))
    for at, seen in zip(due, outcomes, strict=True):
        if seen is not None:
            latencies.first_pixel_s.append(seen.first_pixel - began - at)
            latencies.picture_s.append(seen.picture - began - at)
    return Latencies(latencies.first_pixel_s, latencies.picture_s, outcomes.count(None))


async def _at(ask: Ask, due: float, seed: int) -> Seen | None:
    await asyncio.sleep(due - time.perf_counter())
    try:
        return await ask(seed)
    except NoPicture:
        return None
