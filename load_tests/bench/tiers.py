"""Latency of the cache tiers and of the replicas' coordination (leases, events, commits), encryption included.

Needs Debian's redis-server; it starts a server of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry
from safelight_server.coordination.leadership import Leadership
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.disk import DiskStore
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.redis import RedisConnection, RedisStore
from safelight_server.storage.sealed import Entry, Sealer
from safelight_server.storage.tiers import Tier, Tiers
from safelight_server.telemetry.metrics import TierMetrics

from load_tests.bench.runner import Report, Row
from tests.support.redis_server import RedisServer


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: entries of each size in each tier, and as many leases, events and commits."""

    num_bytes: tuple[int, ...] = (8 << 10, 64 << 10, 1 << 20)
    count: int = 300


SMOKE = Plan(num_bytes=(1 << 10,), count=5)


def measure(plan: Plan) -> Report:
    """Measures both tables."""
    return asyncio.run(_measure(plan))


async def _measure(plan: Plan) -> Report:
    sealer = Sealer(Keyring.random())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            connection = RedisConnection(server.url, 5.0)
            stores = (
                Tier(MemoryStore(1 << 30)),
                Tier(await DiskStore.open(Path(folder) / "cache", 1 << 30), Breaker("disk", 5.0)),
                Tier(RedisStore(connection), Breaker("redis", 5.0), shared=True),
            )
            for tier in stores:
                tiers = Tiers([tier], sealer, TierMetrics(CollectorRegistry()))
                rows += [await _tier(tiers, tier, size, plan.count) for size in plan.num_bytes]
            agreed = await _coordination(RedisCoordinator(connection, Breaker("redis", 5.0)), plan.count)
            await connection.close()
        finally:
            server.kill()
    return Report("tiers", {"Entries": rows, "What replicas agree on, through Redis": agreed})


async def _tier(tiers: Tiers, tier: Tier, size: int, count: int) -> Row:
    """Puts and gets entries of one size in one tier."""
    entry = Entry(secrets.token_bytes(size))
    puts, gets = [], []
    for number in range(count):
        key = f"ab01/exact/{number:064x}"
        started = time.perf_counter()
        await tiers.put(key, entry, 600.0, replicate=tier.shared)
        puts.append(time.perf_counter() - started)
        started = time.perf_counter()
        found = await tiers.get(key)
        gets.append(time.perf_counter() - started)
        assert found is not None
    return {"tier": tier.name, "kib": size / 1024, **_quantiles("get", gets), **_quantiles("put", puts)}


async def _coordination(coordinator: RedisCoordinator, count: int) -> list[Row]:
    """Takes leases, publishes events, commits."""
    takes, publishes, commits = [], [], []
    for number in range(count):
        started = time.perf_counter()
        leader = await Leadership.take(coordinator, f"x{number}", 10.0)
        takes.append(time.perf_counter() - started)
        assert leader is not None
        started = time.perf_counter()
        await leader.publish(bytes(2048))
        publishes.append(time.perf_counter() - started)
        started = time.perf_counter()
        await leader.commit("pointer", b"bill", 10.0)
        commits.append(time.perf_counter() - started)
        await leader.close()
    named = {"lease": takes, "event of 2 KiB": publishes, "commit": commits}
    return [{"what": what, **_quantiles("ms", seconds)} for what, seconds in named.items()]


def _quantiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    return {f"{name}_p{q}": 1e3 * float(np.quantile(seconds, q / 100)) for q in (50, 99)}
