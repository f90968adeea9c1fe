"""The latency benchmark's arrivals are the same for all servers, and latency counts from when each was due."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from load_tests.bench.arrivals import capacity, poisson, schedule
from load_tests.bench.requests import NoPicture, Seen


async def at_once(seed: int) -> Seen:
    now = time.perf_counter()
    return Seen(now, now)


def test_arrivals_are_poisson_and_the_same_for_every_server():
    due = np.array(schedule(10.0, 2000.0, 1))
    gaps = np.diff(due)
    assert len(due) / 2000.0 == pytest.approx(10.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)
    assert schedule(10.0, 2000.0, 1) == due.tolist()
    assert np.array(schedule(5.0, 4000.0, 1)) == pytest.approx(2 * due[: len(schedule(5.0, 4000.0, 1))])


def test_there_is_always_one_arrival():
    assert len(schedule(0.001, 0.01, 0)) == 1


async def test_latency_counts_from_when_a_request_was_due_however_late_it_was_sent():
    async def first_holds_up_the_clients(seed: int) -> Seen:
        if seed == 0:
            time.sleep(0.3)  # noqa: ASYNC251  # the others are due meanwhile and cannot be sent
        return await at_once(seed)

    latencies = await poisson(first_holds_up_the_clients, 100.0, 0.1, 0)
    due = schedule(100.0, 0.1, 0)
    assert len(latencies.picture_s) == len(due) > 2
    assert latencies.picture_s[-1] >= due[0] + 0.29 - due[-1]  # the loop's timers ring up to a millisecond early


async def test_failures_are_counted_and_give_no_latency():
    async def every_other(seed: int) -> Seen:
        if seed % 2:
            raise NoPicture("full")
        return await at_once(seed)

    latencies = await poisson(every_other, 200.0, 0.1, 0)
    total = len(schedule(200.0, 0.1, 0))
    assert latencies.num_failed == total // 2
    assert len(latencies.first_pixel_s) == total - total // 2


async def test_capacity_is_what_the_clients_got_in_the_time():
    async def slow(seed: int) -> Seen:
        await asyncio.sleep(0.01)
        return await at_once(seed)

    assert 0 < await capacity(slow, 4, 0.2) <= 400
