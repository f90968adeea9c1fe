"""Token buckets: never more than rate * t + burst, and a caller that waits for the promised time is served."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.coordination.buckets import SLACK_S, BucketDemand, BucketRate, LocalTokenBuckets


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


rates = st.builds(BucketRate, per_s=st.floats(0.01, 1000), burst=st.floats(1, 50))
pauses = st.lists(st.one_of(st.just(0.0), st.floats(0, 3)), max_size=60)


def one(rate: BucketRate, bucket: str = "x", needed: float = 1.0, cost: float = 1.0) -> BucketDemand:
    return BucketDemand(bucket, rate, needed, cost)


@given(rates, pauses)
def test_no_interval_has_more_than_its_rate_and_one_burst(rate: BucketRate, pauses: list[float]) -> None:
    clock = Clock()
    buckets = LocalTokenBuckets(clock)
    admitted: list[float] = []
    for pause in pauses:
        clock.now += pause
        if buckets.spend([one(rate)])[0]:
            admitted.append(clock.now)
    for first, began in enumerate(admitted):
        for last in range(first, len(admitted)):
            most = rate.per_s * (admitted[last] - began) + rate.burst
            assert last - first + 1 <= most + 1e-6


@given(rates, st.lists(st.tuples(st.floats(0, 2), st.floats(0, 30)), max_size=20), st.floats(1e-6, 1))
def test_the_wait_is_true(rate: BucketRate, costs: list[tuple[float, float]], needed: float) -> None:
    """A caller that waits so long is served; one that waits two milliseconds less is not, apart from rounding."""
    clock = Clock()
    buckets = LocalTokenBuckets(clock)
    for pause, cost in costs:
        clock.now += pause
        buckets.spend([one(rate, needed=-1e300, cost=cost)])
    enough, [tokens] = buckets.spend([one(rate, needed=needed, cost=0)])
    wait_s = rate.wait_s(tokens, needed)
    assert enough is (wait_s == 0)
    began = clock.now
    if wait_s > SLACK_S + 0.001:
        clock.now = began + wait_s - SLACK_S - 0.001 - 1e-6
        assert not buckets.spend([one(rate, needed=needed + 1e-9 * rate.per_s, cost=0)])[0]
    clock.now = began + wait_s
    assert buckets.spend([one(rate, needed=needed)])[0]


def test_costs_are_taken_from_all_buckets_or_from_none() -> None:
    rate = BucketRate(1, 2)
    buckets = LocalTokenBuckets(Clock())
    assert buckets.spend([one(rate, "a"), one(rate, "b")]) == (True, [1, 1])
    assert buckets.spend([one(rate, "a"), one(rate, "b", needed=1.5)]) == (False, [1, 1])
    assert buckets.spend([one(rate, "a"), one(rate, "b")]) == (True, [0, 0])
    assert buckets.spend([one(rate, "b"), one(rate, "a")]) == (False, [0, 0])


def test_a_cost_may_leave_a_debt_that_is_paid_with_time() -> None:
    clock, rate = Clock(), BucketRate(0.5, 10)
    buckets = LocalTokenBuckets(clock)
    assert buckets.spend([one(rate, needed=-1e300, cost=25)]) == (True, [-15])
    assert rate.wait_s(-15, 0) == pytest.approx(30 + SLACK_S)
    clock.now += 20
    assert buckets.spend([one(rate, needed=0)]) == (False, [-5])
    clock.now += 1000
    assert buckets.spend([one(rate, cost=0)]) == (True, [10]), "no more than the burst"


def test_full_buckets_use_no_memory() -> None:
    clock, rate = Clock(), BucketRate(10, 5)
    buckets = LocalTokenBuckets(clock)
    for bucket in range(100):
        buckets.spend([one(rate, f"{bucket}")])
    assert len(buckets) == 100
    clock.now += 1
    for bucket in range(100):
        buckets.spend([one(rate, f"{bucket}", cost=0)])
    assert len(buckets) == 0


def test_a_bucket_follows_new_limits() -> None:
    clock = Clock()
    buckets = LocalTokenBuckets(clock)
    buckets.spend([one(BucketRate(1, 100), cost=10)])
    assert buckets.spend([one(BucketRate(1, 5), cost=0)]) == (True, [5])
    clock.now += 1
    assert buckets.spend([one(BucketRate(1, 100), cost=0)])[1] == [100], "a full one is forgotten"


def test_what_redis_said_counts_from_then_on() -> None:
    clock, rate = Clock(), BucketRate(1, 10)
    buckets = LocalTokenBuckets(clock)
    buckets.put([one(rate)], [-2.0])
    clock.now += 4
    assert buckets.spend([one(rate)]) == (True, [1])


def test_waits_are_whole_milliseconds_and_never_short() -> None:
    rate = BucketRate(3, 1)
    assert rate.wait_s(1, 1) == 0
    assert rate.wait_s(0, 1) == pytest.approx(0.334 + SLACK_S)
    assert math.isfinite(BucketRate(1e-6, 1).wait_s(-1e9, 1))
