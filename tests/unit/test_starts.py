"""Latents to start from, found again by a replica that did not make them."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from safelight_server.cache import starts
from safelight_server.cache.bands import Bands
from safelight_server.cache.checkpoints import Checkpoints, Policy
from safelight_server.cache.eviction import LeastBenefit
from safelight_server.cache.spaces import OutputName, Spaces
from safelight_server.cache.starts import Starts
from safelight_server.cache.store.keyring import Keyring
from safelight_server.cache.store.memory import MemoryStore
from safelight_server.cache.store.sealed import Sealer
from safelight_server.cache.store.tiers import Tier, Tiers
from safelight_server.cache.vectors import Vectors
from safelight_server.latents import Snapshot
from safelight_server.runtime.simulated import LATENT, simulated_pipeline
from safelight_server.telemetry.metrics import TierMetrics

from tests.support.stores import keys_of

STEPS = 20
PIPELINE = simulated_pipeline()


def vector(seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    return found / np.linalg.norm(found)


class Replica:
    """What is in memory only, over a tier that outlives it."""

    def __init__(self, store: MemoryStore, keyring: Keyring, max_bytes: int = 1 << 20) -> None:
        tiers = Tiers([Tier(store, shared=True)], Sealer(keyring), TierMetrics(CollectorRegistry()))
        self.spaces = Spaces(keyring, {})
        self.checkpoints = Checkpoints(tiers, keyring, Policy(5))
        self.starts = Starts(self.checkpoints, Vectors(tiers, 60.0), Bands(), LeastBenefit(max_bytes), max_items=100)

    def name(self, tenant: str, exact: str) -> OutputName:
        return OutputName(self.spaces.of(tenant), exact, "c0")

    async def finish(self, tenant: str, exact: str, seed: int) -> None:
        """An output that has left checkpoints."""
        name = self.name(tenant, exact)
        for step in (2, 4, 6, 8, 10):
            snapshot = Snapshot(step, np.full(LATENT, seed, np.float32), np.zeros(LATENT, np.float32))
            await self.checkpoints.keep(name.space.name, exact, snapshot, STEPS)
        owner = self.spaces.owner(name.space, "r", f"g{seed}")
        await self.starts.add(name, PIPELINE, vector(seed), owner, STEPS, 1000)

    async def found(self, tenant: str, seed: int) -> float | None:
        start = await self.starts.find(self.name(tenant, "new"), PIPELINE, vector(seed), STEPS)
        return None if start is None else float(start.snapshot.x.flat[0])


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


async def test_what_is_dropped_is_not_found_again() -> None:
    store, keyring = MemoryStore(1 << 24), Keyring.random()
    small = Replica(store, keyring, max_bytes=2500)
    for seed in range(1, 5):
        await small.finish("ann", f"a{seed}", seed)
    assert len(await keys_of(store, f"{small.spaces.of('ann').prefix}/vector/")) == 2
    after = Replica(store, keyring)
    await after.found("ann", 1)
    await after.starts.rebuilt()
    assert sum([await after.found("ann", seed) is not None for seed in range(1, 5)]) == 2


async def test_an_index_that_had_to_go_is_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "MAX_INDEXES", 1)
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
