"""A tier that cannot answer is a miss, but no proof that an entry is gone: references to it are kept."""

from __future__ import annotations

import time

import numpy as np
from prometheus_client import CollectorRegistry
from safelight_server.cache.approximate.lsh import MemoryBuckets
from safelight_server.cache.approximate.similar import SimilarPictures
from safelight_server.cache.pictures import PictureFacts, Pictures, pointer
from safelight_server.domain.request import MediaType, PixelEncoding
from safelight_server.storage.base import StoreUnavailableError
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.sealed import Sealer, parse_header
from safelight_server.storage.tiers import Tier, Tiers
from safelight_server.telemetry.metrics import TierMetrics

from tests.support.streams import Here
from tests.unit.test_warm_starts import PIPELINE, STEPS, Replica, vector

PNG = PixelEncoding(MediaType.PNG)
PIXELS = np.zeros((4, 4, 3), np.uint8)


class Away(MemoryStore):
    """A tier that may be unreachable."""

    out = False

    async def get(self, key: str) -> bytes | None:
        self._fail()
        return await super().get(key)

    async def head(self, key: str) -> bytes | None:
        self._fail()
        return await super().head(key)

    def _fail(self) -> None:
        if self.out:
            raise StoreUnavailableError("out")


async def test_latents_are_found_again_after_an_outage_and_not_once_they_are_gone() -> None:
    store = Away(1 << 24)
    replica = Replica(store, Keyring.random())
    await replica.finish("ann", "a1", 1)
    name = replica.name("ann", "a1")
    await replica.checkpoints.ended(
        name.namespace.name, "a1", STEPS, replica.namespaces.owner(name.namespace, "r", "g1")
    )
    store.out = True
    assert await replica.found("ann", 1) is None
    store.out = False
    assert await replica.found("ann", 1) == 1.0
    await replica.checkpoints.delete(name.namespace.name, "a1")
    assert await replica.found("ann", 1) is None
    assert not replica.starts._place


async def test_similar_pictures_are_found_again_after_an_outage_and_not_once_they_are_gone() -> None:
    store, keyring, buckets = Away(1 << 24), Keyring.random(), MemoryBuckets(10)
    tiers = Tiers([Tier(store)], Sealer(keyring), TierMetrics(CollectorRegistry()))
    pictures = Pictures(tiers, keyring, Here(), 60.0)
    similar = SimilarPictures(pictures, buckets, 10, 16, lambda: None)
    replica = Replica(store, keyring)
    name = replica.name("ann", "a1")
    owner = replica.namespaces.owner(name.namespace, "r", "g1")
    await pictures.keep(name, PIXELS, PictureFacts("a potion", "generations/1", "r", STEPS, 1.0))
    await similar.add(name, PIPELINE, "a potion", vector(1), owner, None)

    async def found() -> bool:
        return await similar.find(name, PIPELINE, "a potion", vector(1), 0.9, PNG, set()) is not None

    store.out = True
    assert not await found()
    store.out = False
    assert await found()
    for key in (pointer(name), pointer(name).replace("pixels", "png")):
        await tiers.delete(key)
    assert not await found()
    assert not len(buckets)


async def test_an_encoding_is_kept_no_longer_than_its_pixels() -> None:
    store, keyring = MemoryStore(1 << 24), Keyring.random()
    ago_s = 30.0
    tiers = Tiers([Tier(store)], Sealer(keyring), TierMetrics(CollectorRegistry()), now=lambda: time.time() - ago_s)
    pictures = Pictures(tiers, keyring, Here(), 60.0)
    name = Replica(store, keyring).name("ann", "a1")
    await pictures.keep(name, PIXELS, PictureFacts("a potion", "generations/1", "r", STEPS, 1.0))
    before = parse_header(await store.get(pointer(name)) or b"")
    ago_s = 0.0
    assert await pictures.get(name, PNG) is not None
    after = parse_header(await store.get(pointer(name).replace("pixels", "png")) or b"")
    assert before is not None and after is not None
    assert after.expires_at <= before.expires_at + 1.0
