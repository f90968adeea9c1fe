"""Quotas of tenants: the operator's file, refusals and their retry times, and operation without Redis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.coordination.buckets import BucketDemand, BucketRate, LocalTokenBuckets
from safelight_server.domain.errors import QuotaExceededError
from safelight_server.files import ConfigFileError, WatchedFile
from safelight_server.quotas.limits import QuotaLimits, TenantLimits, parse, watch
from safelight_server.quotas.quotas import Quotas
from safelight_server.storage.base import StoreUnavailableError

from tests.unit.test_token_buckets import Clock

PATH = Path("quotas.json")


def read(content: object) -> object:
    return parse(PATH, json.dumps(content).encode())


def write(folder: Path, **content: object) -> WatchedFile[QuotaLimits]:
    file = folder / "quotas.json"
    file.write_text(json.dumps(content))
    return watch(file)


def bucket(per_s: float, burst: float) -> dict[str, float]:
    return {"per_s": per_s, "burst": burst}


class Redis:
    """The shared buckets, on the test's clock; may be unreachable."""

    def __init__(self, clock: Clock) -> None:
        self.buckets = LocalTokenBuckets(clock)
        self.away = False

    async def spend(self, demands: Sequence[BucketDemand]) -> tuple[bool, list[float]]:
        if self.away:
            raise StoreUnavailableError("away")
        return self.buckets.spend(demands)


async def admitted(quotas: Quotas, tenant: str, attempts: int) -> int:
    count = 0
    for _ in range(attempts):
        try:
            await quotas.admit(tenant)
        except QuotaExceededError:
            continue
        count += 1
    return count


async def left_s(quotas: Quotas, tenant: str = "studio") -> float:
    [view] = await quotas.views([tenant])
    assert view.compute_s is not None
    return view.compute_s.tokens


# --- the file ---


def test_what_a_tenant_leaves_out_is_as_in_default_and_null_is_no_limit() -> None:
    limits = read(
        {
            "default": {"requests": bucket(5, 20), "compute_s": bucket(0.5, 60)},
            "tenants": {"studio": {"requests": bucket(50, 200)}, "lab": {"compute_s": None}, "like": {}},
        }
    )
    few, much = BucketRate(5, 20), BucketRate(0.5, 60)
    assert limits.of("anyone") == limits.of("like") == TenantLimits(few, much)
    assert limits.of("studio") == TenantLimits(BucketRate(50, 200), much)
    assert limits.of("lab") == TenantLimits(few, None)


def test_without_default_others_have_no_limits() -> None:
    limits = read({"tenants": {"studio": {"requests": bucket(1, 1)}}})
    assert limits.of("anyone") == TenantLimits()
    assert read({}).of("anyone") == TenantLimits()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], r"^quotas\.json: file: "),
        ({"defaults": {}}, "defaults: Extra inputs"),
        ({"default": {"request": bucket(1, 1)}}, r"default\.request: Extra"),
        ({"default": {"requests": {"per_s": 1}}}, r"default\.requests\.burst: Field required"),
        ({"default": {"requests": bucket(0, 1)}}, r"default\.requests\.per_s: Input should be greater"),
        ({"default": {"requests": bucket(1, 0.5)}}, r"default\.requests\.burst: Input should be greater"),
        ({"default": {"compute_s": bucket(-1, 1)}}, r"default\.compute_s\.per_s"),
        ({"default": {"compute_s": bucket(1, 1e12)}}, r"default\.compute_s\.burst"),
        ({"tenants": {"a b": {}}}, r"tenants\.a b"),
        ({"tenants": {"a": {"requests": "5/s"}}}, r"tenants\.a\.requests"),
    ],
)
def test_a_faulty_file_is_refused_by_the_name_of_the_field(content: object, fault: str) -> None:
    with pytest.raises(ConfigFileError, match=fault):
        read(content)


async def test_without_a_file_nothing_is_limited_or_kept() -> None:
    quotas = Quotas(None)
    assert await admitted(quotas, "studio", 1000) == 1000
    quotas.charge("studio", 1e9)
    assert len(quotas._local) == 0
    assert quotas.works == []
    [view] = await quotas.views(["studio"])
    assert (view.requests, view.compute_s) == (None, None)


# --- requests ---


async def test_beyond_its_rate_a_tenant_is_told_when_to_come_back(tmp_path: Path) -> None:
    clock = Clock()
    quotas = Quotas(write(tmp_path, default={"requests": bucket(2, 3)}), clock=clock)
    assert await admitted(quotas, "studio", 3) == 3
    with pytest.raises(QuotaExceededError) as refused:
        await quotas.admit("studio")
    error = refused.value
    assert error.reason == "REQUEST_RATE_EXCEEDED"
    assert error.message == "tenant studio sends too many requests: 2 a second are allowed, up to 3 at once"
    assert error.metadata["subject"] == "tenant studio"
    assert error.retry_after_s == pytest.approx(0.501)
    assert await admitted(quotas, "lab", 3) == 3, "each tenant has buckets of its own"
    clock.now += error.retry_after_s
    assert await admitted(quotas, "studio", 3) == 1


@pytest.fixture(scope="module")
def both_limits(tmp_path_factory: pytest.TempPathFactory) -> WatchedFile[QuotaLimits]:
    limits = {"requests": bucket(4, 2), "compute_s": bucket(0.5, 1)}
    return write(tmp_path_factory.mktemp("quotas"), default=limits)


@given(pauses=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.5)), max_size=40))
async def test_a_refused_request_is_not_counted_and_its_wait_is_true(
    both_limits: WatchedFile[QuotaLimits], pauses: list[tuple[float, float]]
) -> None:
    clock = Clock()
    quotas = Quotas(both_limits, clock=clock)
    for pause, compute in pauses:
        clock.now += pause
        try:
            await quotas.admit("studio")
        except QuotaExceededError as error:
            assert error.retry_after_s is not None and error.retry_after_s > 0
            clock.now += error.retry_after_s
            await quotas.admit("studio")
        quotas.charge("studio", compute)


# --- compute ---


async def test_a_tenant_goes_into_debt_and_is_admitted_again_when_it_is_paid(tmp_path: Path) -> None:
    clock = Clock()
    quotas = Quotas(write(tmp_path, default={"compute_s": bucket(0.5, 10)}), clock=clock)
    await quotas.admit("studio")
    quotas.charge("studio", 9.9)
    await quotas.admit("studio")
    quotas.charge("studio", 5.1)
    with pytest.raises(QuotaExceededError) as refused:
        await quotas.admit("studio")
    error = refused.value
    assert error.reason == "COMPUTE_QUOTA_EXCEEDED"
    assert "it is 5 s in debt" in error.message
    assert error.retry_after_s == pytest.approx(10.001, abs=0.0011)
    clock.now += error.retry_after_s
    await quotas.admit("studio")


async def test_the_longest_wait_is_told_where_both_are_exceeded(tmp_path: Path) -> None:
    limits = {"requests": bucket(1, 1), "compute_s": bucket(1, 1)}
    quotas = Quotas(write(tmp_path, default=limits), clock=Clock())
    await quotas.admit("studio")
    with pytest.raises(QuotaExceededError) as refused:
        await quotas.admit("studio")
    assert refused.value.reason == "REQUEST_RATE_EXCEEDED"
    quotas.charge("studio", 6)
    with pytest.raises(QuotaExceededError) as refused:
        await quotas.admit("studio")
    assert refused.value.reason == "COMPUTE_QUOTA_EXCEEDED"
    assert refused.value.retry_after_s == pytest.approx(5.001, abs=0.0011)


async def test_what_is_left_is_listed(tmp_path: Path) -> None:
    file = write(tmp_path, default={"compute_s": bucket(2, 10)}, tenants={"lab": {"requests": bucket(1, 5)}})
    quotas = Quotas(file, clock=Clock())
    assert quotas.tenants == ["lab"]
    await quotas.admit("lab")
    quotas.charge("studio", 14)
    lab, studio = await quotas.views(["lab", "studio"])
    assert lab.requests is not None and (lab.requests.tokens, lab.requests.available_after_s) == (4, 0)
    assert lab.compute_s is not None and lab.compute_s.full_after_s == 0
    assert studio.requests is None and studio.compute_s is not None
    assert studio.compute_s.tokens == -4
    assert studio.compute_s.available_after_s == pytest.approx(2.001, abs=0.0011)
    assert studio.compute_s.full_after_s == pytest.approx(7.001)
    assert await quotas.views(["lab", "studio"]) == [lab, studio], "looking costs nothing"


# --- with Redis ---


async def test_replicas_share_their_buckets_and_charges_reach_the_others(tmp_path: Path) -> None:
    clock = Clock()
    redis = Redis(clock)
    file = write(tmp_path, default={"requests": bucket(1, 4), "compute_s": bucket(1, 10)})
    one, other = (Quotas(file, redis, clock=clock) for _ in range(2))
    assert await admitted(one, "studio", 3) + await admitted(other, "studio", 3) == 4
    one.charge("studio", 7)
    other.charge("studio", 5)
    for quotas in (one, other):
        await quotas._charge_shared()
        await quotas._charge_shared()
    assert await left_s(one) == await left_s(other) == -2
    one.charge("studio", 1)
    await one.close()
    assert await left_s(other) == -3


async def test_any_number_of_tenants_is_charged_in_short_calls(tmp_path: Path) -> None:
    clock = Clock()
    redis, sizes = Redis(clock), []
    spend = redis.spend

    async def counted(demands: Sequence[BucketDemand]) -> tuple[bool, list[float]]:
        sizes.append(len(demands))
        return await spend(demands)

    redis.spend = counted  # type: ignore[method-assign]
    quotas = Quotas(write(tmp_path, default={"compute_s": bucket(1, 10)}), redis, clock=clock)
    for number in range(1200):
        quotas.charge(f"tenant-{number}", 3)
    await quotas._charge_shared()
    assert sizes == [500, 500, 200]
    assert len(redis.buckets) == 1200
    assert await left_s(quotas, "tenant-1199") == 7


async def test_a_replica_without_redis_goes_on_from_what_it_knew(tmp_path: Path) -> None:
    clock = Clock()
    redis = Redis(clock)
    file = write(tmp_path, default={"requests": bucket(1, 10), "compute_s": bucket(1, 10)})
    one, other = (Quotas(file, redis, clock=clock) for _ in range(2))
    assert await admitted(one, "studio", 6) == 6
    redis.away = True
    assert await admitted(one, "studio", 10) == 4, "it is limited all the same"
    assert await admitted(other, "studio", 20) == 10, "each replica alone"
    one.charge("studio", 25)
    assert await left_s(one) == -15, "charged where it was computed"
    await one._charge_shared()
    clock.now += 12
    redis.away = False
    assert await left_s(one) == 10, "the others know nothing of it yet"
    await one._charge_shared()
    assert await left_s(one) == await left_s(other) == 0, "no more than one burst is charged afterwards"


async def test_compute_of_a_short_outage_is_charged_whole(tmp_path: Path) -> None:
    clock = Clock()
    redis = Redis(clock)
    quotas = Quotas(write(tmp_path, default={"compute_s": bucket(1, 10)}), redis, clock=clock)
    quotas.charge("studio", 2)
    redis.away = True
    await quotas._charge_shared()
    quotas.charge("studio", 3)
    redis.away = False
    await quotas._charge_shared()
    assert await left_s(quotas) == 5
