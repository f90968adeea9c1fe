"""Quotas in Redis: replicas share a bucket by Redis' clock, and without Redis each replica uses its own."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import quotas_pb2, quotas_pb2_grpc
from safelight_server.coordination.buckets import (
    PREFIX,
    BucketDemand,
    BucketRate,
    LocalTokenBuckets,
    SharedTokenBuckets,
)
from safelight_server.storage.base import StoreUnavailableError
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.redis import RedisConnection

from tests.integration.test_requests import refusal
from tests.support.coordination import until
from tests.support.redis_server import RedisServer
from tests.support.replicas import Replica, collect, replicas
from tests.unit.test_token_buckets import Clock, one

Connect = Callable[..., RedisConnection]
SLOW = 1e-6
"""A refill rate that is too slow to matter during a test."""


def shared(connection: RedisConnection) -> SharedTokenBuckets:
    return SharedTokenBuckets(connection, Breaker("redis", 5.0, max_failures=3, open_s=0.1))


async def test_of_many_at_once_from_two_replicas_no_more_than_the_burst_is_admitted(
    redis_server: RedisServer, connect: Connect
) -> None:
    both = [shared(connect(redis_server.url)) for _ in range(2)]
    spent = await asyncio.gather(*(both[n % 2].spend([one(BucketRate(SLOW, 7))]) for n in range(40)))
    assert sum(enough for enough, _ in spent) == 7


async def test_the_script_and_the_buckets_of_one_process_agree(redis_server: RedisServer, connect: Connect) -> None:
    buckets, local, chance = shared(connect(redis_server.url)), LocalTokenBuckets(Clock()), random.Random(7)
    for _ in range(300):
        names = chance.sample("abcd", chance.randint(1, 3))
        demands = [
            BucketDemand(
                name,
                BucketRate(SLOW, chance.choice([3.0, 5.5])),
                chance.choice([-1e300, 1e-6, 1.0, 2.5]),
                chance.choice([0.0, 0.001, 1.0, 2.0]),
            )
            for name in names
        ]
        enough, tokens = await buckets.spend(demands)
        expected, held = local.spend(demands)
        assert enough is expected
        assert tokens == pytest.approx(held, abs=1e-3)
        if min(held) < -10:
            local = LocalTokenBuckets(Clock())
            await connect(redis_server.url).client.flushall()


async def test_the_wait_is_true_by_the_time_of_redis(redis_server: RedisServer, connect: Connect) -> None:
    buckets, rate = shared(connect(redis_server.url)), BucketRate(5, 1)
    assert (await buckets.spend([one(rate)]))[0]
    for _ in range(3):
        enough, [tokens] = await buckets.spend([one(rate)])
        if not enough:
            await asyncio.sleep(rate.wait_s(tokens, 1.0))
            enough, _ = await buckets.spend([one(rate)])
        assert enough


async def test_a_debt_is_kept_and_a_full_bucket_is_not(redis_server: RedisServer, connect: Connect) -> None:
    connection = connect(redis_server.url)
    buckets, keys = shared(connection), lambda: connection.client.keys(f"{PREFIX}*")
    assert (await buckets.spend([one(BucketRate(SLOW, 2), "debt", cost=1e6)]))[0]
    assert (await buckets.spend([one(BucketRate(50, 2), "short")]))[0]
    await buckets.spend([one(BucketRate(1, 2), "seen", cost=0)])

    async def only_the_debt() -> bool:
        return await keys() == [f"{PREFIX}debt".encode()]

    await until(only_the_debt)
    assert await connection.client.pttl(f"{PREFIX}debt") > 1e6
    assert (await buckets.spend([one(BucketRate(SLOW, 2), "debt", cost=0)]))[1] == [pytest.approx(2 - 1e6)]


async def test_without_redis_the_caller_hears_it(redis_server: RedisServer, connect: Connect) -> None:
    buckets = shared(connect(redis_server.url))
    await buckets.spend([one(BucketRate(1, 1))])
    redis_server.kill()
    with pytest.raises(StoreUnavailableError):
        await buckets.spend([one(BucketRate(1, 1))])


def short(seed: int) -> pb.GenerateRequest:
    spec = pb.GenerationSpec(prompt="a red potion", num_inference_steps=2, outputs=[pb.OutputSpec(seed=seed)])
    return pb.GenerateRequest(spec=spec)


async def left(replica: Replica) -> quotas_pb2.TenantQuota:
    assert replica.channel is not None
    stub = quotas_pb2_grpc.QuotaServiceStub(replica.channel)
    [quota] = (await stub.ListQuotas(quotas_pb2.ListQuotasRequest())).quotas
    return quota


async def test_two_replicas_share_one_bucket_and_go_on_alone_without_redis(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    limits = {"requests": {"per_s": SLOW, "burst": 5}, "compute_s": {"per_s": SLOW, "burst": 1000}}
    (tmp_path / "quotas.json").write_text(json.dumps({"default": limits}))  # so small that blocking does not matter
    async with replicas(redis_server.url, tmp_path, quota_file=tmp_path / "quotas.json") as both:
        one, other = both
        usages = []
        for seed, replica in enumerate((one, other, one)):
            events = await collect(replica.stub.Generate(short(seed)))
            usages.append(events[-1].finished.usage.compute_time.ToNanoseconds() / 1e9)
        assert [(await left(replica)).requests.left for replica in both] == [pytest.approx(2, abs=0.01)] * 2

        async def charged() -> bool:
            used = [(await left(replica)).compute_seconds.used for replica in both]
            return used == [pytest.approx(sum(usages), abs=0.01)] * 2

        await until(charged)
        redis_server.kill()
        admitted = 0
        for seed in range(10, 18):
            try:
                await collect(one.stub.Generate(short(seed)))
                admitted += 1
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert admitted == 2, "from what it knew last"
        redis_server.start()

        async def shared_again() -> bool:
            return (await left(one)).requests.left == pytest.approx(5, abs=0.01)

        await until(shared_again)
        for seed in range(20, 25):
            await collect(both[seed % 2].stub.Generate(short(seed)))
        for replica in both:
            code, found = await refusal(replica.stub.Generate(short(30)))
            assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_RATE_EXCEEDED")
