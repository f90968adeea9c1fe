"""Uploaded pictures are kept for their tenant, for a time, within its bytes, and for all replicas that share a store."""

from __future__ import annotations

import asyncio
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from PIL import Image
from safelight_server.cache.images import ENTRY_BYTES, Images, UploadedImage
from safelight_server.cache.namespaces import Namespaces
from safelight_server.domain.errors import UnavailableError
from safelight_server.domain.uploads import PictureFile
from safelight_server.generations.init_images import MOST_READ, InitImages
from safelight_server.storage.base import StoreError
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.purge import PurgeScope, purge
from safelight_server.storage.sealed import Sealer
from safelight_server.storage.tiers import Tier, Tiers

from tests.support.stores import FaultyStore, Numbers
from tests.support.streams import SPEC

FACTS = PictureFile("image/png", 12, 9)
POOL = {"pool": ("ann", "bob")}
TTL_S = 600.0


class Stage:
    """The pictures of two replicas that share a store; each also has its own memory."""

    def __init__(self, *, shared: bool = True, max_tenant_bytes: int = 1 << 20, memory_bytes: int = 1 << 20) -> None:
        self.now = 1000.0
        self.store = FaultyStore("objects")
        keyring = Keyring.random()
        self.replicas, self.tiers = [], []
        for _ in range(2):
            tiers = [Tier(MemoryStore(memory_bytes))]
            if shared:
                tiers.append(Tier(self.store, Breaker("objects", 0.5, 3, 1.0), shared=True))
            over = Tiers(tiers, Sealer(keyring, lambda: self.now), Numbers().metrics)
            self.tiers.append(over)
            self.replicas.append(
                Images(
                    over,
                    keyring,
                    Namespaces(keyring, POOL),
                    ttl_s=TTL_S,
                    max_tenant_bytes=max_tenant_bytes,
                    shared=shared,
                )
            )


async def test_a_picture_is_found_at_every_replica_by_its_tenant_alone():
    stage = Stage()
    here, there = stage.replicas
    await here.put("ann", "d1", b"file", FACTS)
    found = await there.get("ann", "d1")
    assert found is not None
    assert (found.data, found.facts, found.expires_at) == (b"file", FACTS, stage.now + TTL_S)
    assert await there.get("bob", "d1") is None, "not even in a pool"
    assert await there.get("ann", "d2") is None


async def test_a_picture_goes_when_its_time_is_over_unless_it_is_used():
    stage = Stage(shared=False)
    here = stage.replicas[0]
    await here.put("ann", "asked", b"file", FACTS)
    await here.put("ann", "used", b"file", FACTS)
    stage.now += 0.7 * TTL_S
    assert await here.get("ann", "asked") is not None
    assert await here.get("ann", "used", use=True) is not None
    stage.now += 0.7 * TTL_S
    assert await here.get("ann", "asked") is None
    assert await here.get("ann", "used") is not None


async def test_the_oldest_of_a_tenant_go_when_it_has_too_many_bytes():
    stage = Stage(max_tenant_bytes=3 * (100 + ENTRY_BYTES))
    here = stage.replicas[0]
    await here.put("bob", "d0", bytes(100), FACTS)
    for name in ("d0", "d1", "d2"):
        await here.put("ann", name, bytes(100), FACTS)
    assert await here.get("ann", "d0", use=True) is not None
    await here.put("ann", "d3", bytes(100), FACTS)
    there = {name: await here.get("ann", name) is not None for name in ("d0", "d1", "d2", "d3")}
    assert there == {"d0": True, "d1": False, "d2": True, "d3": True}
    assert await here.get("bob", "d0") is not None
    await here.put("ann", "large", bytes(3 * (100 + ENTRY_BYTES)), FACTS)
    assert await here.get("ann", "large") is not None, "the newest is kept"
    assert await here.get("ann", "d3") is None


async def test_an_upload_that_other_replicas_would_not_find_is_refused():
    stage = Stage()
    here, _ = stage.replicas
    stage.store.fault = "unavailable"
    with pytest.raises(UnavailableError) as refused:
        await here.put("ann", "d1", b"file", FACTS)
    assert refused.value.reason == "IMAGE_NOT_STORED"
    with pytest.raises(StoreError):
        await here.get("ann", "d2")


async def test_an_upload_that_no_memory_holds_is_refused():
    stage = Stage(shared=False, memory_bytes=1000)
    with pytest.raises(UnavailableError):
        await stage.replicas[0].put("ann", "d1", bytes(2000), FACTS)


@pytest.mark.parametrize("when", ["before", "while"])
async def test_what_is_purged_while_it_is_used_is_not_written_again(when):
    """A picture whose time is half over is written anew when it is used."""
    stage = Stage(shared=False)
    here, tiers = stage.replicas[0], stage.tiers[0]
    await here.put("ann", "d1", b"file", FACTS)
    stage.now += 0.7 * TTL_S
    read = tiers.tiers[0].store.get
    purges = []

    async def purged_meanwhile(key):
        value = await read(key)
        purges.append(asyncio.create_task(purge(tiers, PurgeScope())))
        if when == "before":
            await purges[-1]
        return value

    tiers.tiers[0].store.get = purged_meanwhile
    assert await here.get("ann", "d1", use=True) is not None
    await asyncio.gather(*purges)
    tiers.tiers[0].store.get = read
    assert await here.get("ann", "d1") is None


class ReadImages:
    """Stands for `Images`; counts what was read."""

    num_read = 0

    async def get(self, tenant: str, digest: str, *, use: bool) -> UploadedImage:
        self.num_read += 1
        return UploadedImage(digest, FACTS, picture(), 0.0)


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


async def test_few_files_are_in_memory_however_many_generations_wait_for_theirs():
    """Each may have 16 MiB, and they wait before the queue, whose bounds do not count them."""
    images, going_on = ReadImages(), threading.Event()
    spec = replace(SPEC, init_image="d1", width_px=8, height_px=8)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(going_on.wait, 30)
        decoding = InitImages(images, pool, 1 << 20)
        waiting = [asyncio.create_task(decoding.load("ann", spec)) for _ in range(30)]
        for _ in range(200):
            await asyncio.sleep(0)
        num_read = images.num_read
        going_on.set()
        found = await asyncio.gather(*waiting)
    assert num_read == MOST_READ
    assert images.num_read == len(found) == 30
