"""Latency of the caches' tiers, side by side in one run: `python -m load_tests.tiers`.

Starts a redis-server of its own. Sealing and opening are part of what is timed;
the load of the machine stands beside the figures.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path

from prometheus_client import CollectorRegistry
from safelight_server.cache.coordination.leadership import Leadership
from safelight_server.cache.coordination.redis import RedisCoordinator
from safelight_server.cache.store.breaker import Breaker
from safelight_server.cache.store.disk import DiskStore
from safelight_server.cache.store.keyring import Keyring
from safelight_server.cache.store.memory import MemoryStore
from safelight_server.cache.store.redis import RedisConnection, RedisStore
from safelight_server.cache.store.sealed import Entry, Sealer
from safelight_server.cache.store.tiers import Tier, Tiers
from safelight_server.telemetry.metrics import TierMetrics

from tests.support.redis_server import RedisServer

SIZES = (8 << 10, 64 << 10, 1 << 20)
ROUNDS = 300


async def main() -> None:
    """Prints the table."""
    sealer = Sealer(Keyring.random())
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
            print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; ms, p50 / p99 of {ROUNDS}")
            for tier in stores:
                tiers = Tiers([tier], sealer, TierMetrics(CollectorRegistry()))
                for size in SIZES:
                    await measure_tier(tiers, tier, size)
            await measure_coordination(RedisCoordinator(connection, Breaker("redis", 5.0)))
            await connection.close()
        finally:
            server.kill()


async def measure_tier(tiers: Tiers, tier: Tier, size: int) -> None:
    """Puts and gets entries of one size in one tier."""
    entry = Entry(secrets.token_bytes(size))
    puts, gets = [], []
    for number in range(ROUNDS):
        key = f"ab01/exact/{number:064x}"
        started = time.perf_counter()
        await tiers.put(key, entry, 600.0, replicate=tier.shared)
        puts.append(time.perf_counter() - started)
        started = time.perf_counter()
        found = await tiers.get(key)
        gets.append(time.perf_counter() - started)
        assert found is not None
    print(f"{tier.name:8} {size >> 10:5} KiB   get {figures(gets)}   put {figures(puts)}")


async def measure_coordination(coordinator: RedisCoordinator) -> None:
    """Takes, publishes and commits."""
    takes, publishes, commits = [], [], []
    for number in range(ROUNDS):
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
    print(f"lease {figures(takes)}   event of 2 KiB {figures(publishes)}   commit {figures(commits)}")


def figures(seconds: list[float]) -> str:
    """Median and 99th percentile in milliseconds."""
    p99 = statistics.quantiles(seconds, n=100)[98]
    return f"{statistics.median(seconds) * 1000:.3f} / {p99 * 1000:.3f}"


if __name__ == "__main__":
    asyncio.run(main())
