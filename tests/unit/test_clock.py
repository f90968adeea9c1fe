"""All replicas have the same Unix time, even if their machines' clocks are wrong."""

from __future__ import annotations

import pytest
from safelight_server.storage.base import StoreUnavailableError
from safelight_server.storage.clock import MAX_OFFSET_S, SharedClock
from structlog.testing import capture_logs

REDIS_AT_0 = 1_800_000_000.0


class Bench:
    """A machine whose clock is `skew_s` ahead, and a Redis that answers after `delay_s`."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self.skew_s = skew_s
        self.delay_s = 0.0
        self.seconds = 50.0
        self.offsets: list[float] = []
        self.clock = SharedClock(lambda: self.real + self.skew_s, lambda: self.seconds, self.offsets.append)

    @property
    def real(self) -> float:
        return REDIS_AT_0 + self.seconds

    async def measure(self) -> None:
        async def answer() -> float:
            self.seconds += self.delay_s / 2
            there = self.real
            self.seconds += self.delay_s / 2
            return there

        await self.clock.measure(answer)


@pytest.mark.parametrize("skew_s", [0.0, 300.0, -300.0])
async def test_the_time_is_that_of_redis(skew_s: float) -> None:
    bench = Bench(skew_s)
    assert bench.clock.now() == bench.real + skew_s, "what else, before anything is known"
    bench.delay_s = 0.2
    await bench.measure()
    bench.seconds += 60.0
    assert bench.clock.now() == pytest.approx(bench.real)
    assert bench.offsets == [pytest.approx(skew_s)]


async def test_a_clock_that_is_set_changes_nothing() -> None:
    bench = Bench()
    await bench.measure()
    bench.skew_s = -7200.0
    assert bench.clock.now() == pytest.approx(bench.real)


@pytest.mark.parametrize("read_at", [0.0, 0.3, 1.0])
async def test_a_slow_answer_changes_nothing_where_the_clock_may_be_right(read_at: float) -> None:
    bench = Bench(300.0)
    await bench.measure()

    async def slow() -> float:
        bench.seconds += 4.0 * read_at
        there = bench.real
        bench.seconds += 4.0 * (1.0 - read_at)
        return there

    await bench.clock.measure(slow)
    assert bench.clock.now() == pytest.approx(bench.real, abs=1e-3)
    assert len(bench.offsets) == 2


async def test_a_clock_that_is_certainly_wrong_is_set() -> None:
    bench = Bench()
    bench.delay_s = 4.0
    await bench.measure()
    bench.clock._ahead_s = (bench.clock._ahead_s or 0.0) + 3.0
    await bench.measure()
    assert bench.clock.now() == pytest.approx(bench.real)
    bench.clock._ahead_s += 1.0
    await bench.measure()
    assert bench.clock.now() == pytest.approx(bench.real + 1.0), "it may be, by so slow an answer"
    bench.delay_s = 0.01
    await bench.measure()
    assert bench.clock.now() == pytest.approx(bench.real)


async def test_what_fails_leaves_the_clock_as_it_was() -> None:
    bench = Bench(300.0)
    await bench.measure()

    async def fail() -> float:
        raise StoreUnavailableError("out")

    with pytest.raises(StoreUnavailableError):
        await bench.clock.measure(fail)
    assert bench.clock.now() == pytest.approx(bench.real)


async def test_a_clock_that_is_wrong_is_logged_when_it_becomes_so_and_when_it_is_right_again() -> None:
    bench = Bench(0.9 * MAX_OFFSET_S)
    with capture_logs() as logs:
        await bench.measure()
        assert not logs
        bench.skew_s = -2 * MAX_OFFSET_S
        await bench.measure()
        await bench.measure()
        bench.skew_s = 0.0
        await bench.measure()
        await bench.measure()
    assert [(entry["log_level"], entry["offset_s"]) for entry in logs] == [("warning", -2.0), ("info", 0.0)]
