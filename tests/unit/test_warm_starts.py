"""Warm starts: latents that a replica finds although another one made them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from safelight_server.cache.approximate import warm_starts
from safelight_server.cache.approximate.eviction import LeastBenefit
from safelight_server.cache.approximate.skip_policy import SkipPolicy
from safelight_server.cache.approximate.vectors import Vectors
from safelight_server.cache.approximate.warm_starts import WarmStarts
from safelight_server.cache.checkpoints import CheckpointPolicy, Checkpoints
from safelight_server.cache.namespaces import CacheKeys, Namespaces
from safelight_server.engine.latents import Snapshot
from safelight_server.runtime.simulated import LATENT, simulated_pipeline
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.sealed import Sealer
from safelight_server.storage.tiers import Tier, Tiers
from safelight_server.telemetry.metrics import TierMetrics

from tests.support.stores import keys_of
from tests.support.streams import Clock

STEPS = 20
PIPELINE = simulated_pipeline()


def vector(seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    return found / np.linalg.norm(found)


def near(seed: int) -> np.ndarray:
    """The vector of another prompt, at a cosine of 0.98."""
    found, other = vector(seed), vector(seed + 1_000_000)
    aside = other - (other @ found) * found
    return np.sqrt(1 - 0.98**2, dtype=np.float32) * aside / np.linalg.norm(aside) + np.float32(0.98) * found


class Replica:
    """A replica's memory, over a tier that outlives it."""

    def __init__(self, store: MemoryStore, keyring: Keyring, max_bytes: int = 1 << 20) -> None:
        tiers = Tiers([Tier(store, shared=True)], Sealer(keyring), TierMetrics(CollectorRegistry()))
        self.namespaces = Namespaces(keyring, {})
        self.checkpoints = Checkpoints(tiers, keyring, CheckpointPolicy(5))
        self.clock = Clock()
        eviction = LeastBenefit(max_bytes)
        self.starts = WarmStarts(
            self.checkpoints, Vectors(tiers, 60.0), SkipPolicy(), eviction, max_items=100, clock=self.clock
        )

    def name(self, tenant: str, exact: str) -> CacheKeys:
        return CacheKeys(self.namespaces.of(tenant), exact, lambda: "c0")

    async def finish(self, tenant: str, exact: str, seed: int, at: np.ndarray | None = None) -> None:
        """Stores the checkpoints of a finished output whose prompt has the vector `at`."""
        name = self.name(tenant, exact)
        for step in (2, 4, 6, 8, 10):
            snapshot = Snapshot(step, np.full(LATENT, seed, np.float32), np.zeros(LATENT, np.float32))
            await self.checkpoints.keep(name.namespace.name, exact, snapshot, STEPS)
        owner = self.namespaces.owner(name.namespace, "r", f"g{seed}")
        await self.starts.add(name, PIPELINE, vector(seed) if at is None else at, owner, STEPS, 1000)

    async def found(self, tenant: str, seed: int, taken: set[str] | None = None) -> float | None:
        taken = set() if taken is None else taken
        start = await self.starts.find(self.name(tenant, "new"), PIPELINE, near(seed), STEPS, taken)
        return None if start is None else float(start.snapshot.x.flat[0])


async def test_those_that_begin_nothing_do_not_hide_one_that_would() -> None:
    replica = Replica(MemoryStore(1 << 24), Keyring.random())
    await replica.finish("ann", "neighbour", 3)
    for number in range(6):
        await replica.finish("ann", f"same{number}", 900, near(3))
    assert await replica.found("ann", 3) == 3.0, "the others are of the same prompt"
    for number in range(6):
        await replica.finish("ann", f"other{number}", 3)
    taken = {"neighbour", *(f"other{number}" for number in range(5))}
    assert await replica.found("ann", 3, taken) == 3.0


async def test_after_a_restart_the_index_is_made_anew_on_first_use() -> None:
    store, keyring = MemoryStore(1 << 24), Keyring.random()
    before = Replica(store, keyring)
    for seed in range(1, 5):
        await before.finish("ann", f"a{seed}", seed)
    assert await before.found("ann", 3) == 3.0
    after = Replica(store, keyring)
    assert await after.found("ann", 3) is None, "the first one begins the search and does not wait for it"
    await after.starts.rebuilt()
    assert [await after.found("ann", seed) for seed in range(1, 5)] == [1.0, 2.0, 3.0, 4.0]
    await after.found("bob", 3)
    await after.starts.rebuilt()
    assert await after.found("bob", 3) is None, "each space has its own"


async def test_no_two_outputs_of_a_request_begin_from_one() -> None:
    class Elsewhere(MemoryStore):
        async def get(self, key: str) -> bytes | None:
            await asyncio.sleep(0)
            return await super().get(key)

    replica = Replica(Elsewhere(1 << 24), Keyring.random())
    await replica.finish("ann", "a1", 1)
    taken: set[str] = set()
    first, second = await asyncio.gather(*(replica.found("ann", 1, taken) for _ in range(2)))
    assert {first, second} == {1.0, None}
    assert taken == {"a1"}
    assert await replica.found("ann", 1, taken) is None
    assert await replica.found("ann", 1) == 1.0, "outputs of another request may"


async def test_nothing_is_looked_up_once_it_is_closed() -> None:
    class Endless(MemoryStore):
        async def keys(self, prefix: str = "") -> AsyncIterator[str]:
            while True:  # a stalled one is abandoned in any case
                await asyncio.sleep(0.001)
                yield "a"

    replica = Replica(Endless(1 << 24), Keyring.random())
    assert await replica.found("ann", 1) is None
    await asyncio.sleep(0)
    assert replica.starts._rebuilding
    async with asyncio.timeout(10):
        await replica.starts.close()
    assert not replica.starts._rebuilding


async def test_what_another_replica_keeps_later_is_found_in_time() -> None:
    store, keyring = MemoryStore(1 << 24), Keyring.random()
    one, other = Replica(store, keyring), Replica(store, keyring)
    await one.finish("ann", "a1", 1)
    assert await other.found("ann", 1) is None
    await other.starts.rebuilt()
    await one.finish("ann", "a2", 2)
    other.clock.now += warm_starts.LOOK_EVERY_S / 2
    await other.found("ann", 2)
    assert not other.starts._rebuilding
    other.clock.now += warm_starts.LOOK_EVERY_S / 2
    await other.found("ann", 2)
    await other.starts.rebuilt()
    assert [await other.found("ann", seed) for seed in (1, 2)] == [1.0, 2.0]


async def test_what_is_dropped_is_not_found_again() -> None:
    store, keyring = MemoryStore(1 << 24), Keyring.random()
    small = Replica(store, keyring, max_bytes=2500)
    for seed in range(1, 5):
        await small.finish("ann", f"a{seed}", seed)
    assert len(await keys_of(store, f"{small.namespaces.of('ann').prefix}/vector/")) == 2
    after = Replica(store, keyring)
    await after.found("ann", 1)
    await after.starts.rebuilt()
    assert sum([await after.found("ann", seed) is not None for seed in range(1, 5)]) == 2


async def test_an_index_that_had_to_go_is_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_starts, "MAX_INDEXES", 1)
    replica = Replica(MemoryStore(1 << 24), Keyring.random(), max_bytes=4500)
    await replica.starts.rebuilt()
    for seed in (1, 2):
        await replica.finish("ann", f"a{seed}", seed)
    for seed in (3, 4):
        await replica.finish("bob", f"b{seed}", seed)
        await replica.starts.rebuilt()
    await replica.found("ann", 1)
    await replica.starts.rebuilt()
    assert [await replica.found("ann", seed) for seed in (1, 2, 3)] == [1.0, 2.0, None]
    await replica.found("bob", 3)
    await replica.starts.rebuilt()
    assert [await replica.found("bob", seed) for seed in (3, 4)] == [3.0, 4.0], "what is counted can be found"
