"""Purges on all replicas."""

import asyncio
import time

from safelight_server.cache import purges as module
from safelight_server.cache.purges import Purges
from safelight_server.storage.base import StoreUnavailableError
from safelight_server.storage.purge import PurgeScope
from safelight_server.storage.sealed import Entry
from structlog.testing import capture_logs

from tests.support.coordination import until
from tests.support.local_coordinator import LocalCoordinator
from tests.support.stores import TTL_S, key
from tests.unit.test_cache_purge import TENANTS, left
from tests.unit.test_cache_tiers import KEYRING, Bench

GENERATION = KEYRING.tag("generation", "generations/1")


async def filled() -> Bench:
    bench = Bench()
    for number in (1, 2):
        tag = KEYRING.tag("generation", f"generations/{number}")
        await bench.tiers.put(key(number, TENANTS["acme"]), Entry(b"x", {}, generation=tag), TTL_S)
    await bench.tiers.flush()
    return bench


async def test_every_replica_clears_its_own_tiers_also_one_that_was_away() -> None:
    coordinator = LocalCoordinator()
    here, there, away = [await filled() for _ in range(3)]
    listening = [asyncio.create_task(Purges(there.tiers, coordinator).listen())]
    report = await Purges(here.tiers, coordinator).purge(PurgeScope(generation=GENERATION))
    assert report.failed == []
    listening.append(asyncio.create_task(Purges(away.tiers, coordinator).listen()))
    for bench in (here, there, away):

        async def cleared() -> bool:
            return await left(bench.tiers) == [2]

        await until(cleared)
        assert len(bench.disk.values) == 1
    for task in listening:
        task.cancel()


async def test_its_own_purge_is_not_done_twice() -> None:
    coordinator = LocalCoordinator()
    bench = await filled()
    purges = Purges(bench.tiers, coordinator)
    listening = asyncio.create_task(purges.listen())
    await purges.purge(PurgeScope(TENANTS["acme"] + "/"))
    await bench.tiers.put(key(3, TENANTS["acme"]), Entry(b"x"), TTL_S)
    await coordinator.append(module.STREAM, module.dump("other", PurgeScope("none/")))
    await asyncio.sleep(0.05)
    assert await left(bench.tiers) == [3]
    listening.cancel()


async def test_others_that_could_not_be_told_are_named() -> None:
    class Out(LocalCoordinator):
        async def append(self, name: str, data: bytes) -> str:
            raise StoreUnavailableError("out")

    bench = await filled()
    report = await Purges(bench.tiers, Out()).purge(PurgeScope(TENANTS["acme"] + "/"))
    assert report.failed == ["replicas"]
    assert report.deleted["disk"] == 2


def test_scopes_travel() -> None:
    for scope in (
        PurgeScope("ab01/"),
        PurgeScope("ab01/", b"12345678"),
        PurgeScope(generation=b"\0" * 8),
        PurgeScope(revision=b"x" * 8),
    ):
        assert module.parse(module.dump("me", scope)) == ("me", scope)


async def test_upkeep_measures_and_sweeps(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "SWEEP_EVERY_S", 0.0)
    monkeypatch.setattr(module, "MEASURE_EVERY_S", 0.001)
    bench = await filled()
    bench.now = time.time()
    running = asyncio.create_task(Purges(bench.tiers, LocalCoordinator()).keep_up())
    await until(lambda: asyncio.sleep(0, not bench.disk.values))
    entries = {"tier": "disk"}
    await until(
        lambda: asyncio.sleep(0, bench.numbers.registry.get_sample_value("safelight_cache_entries", entries) == 0)
    )
    running.cancel()


async def test_a_tier_that_rests_while_another_replica_purges_is_cleared_later_and_not_read_before() -> None:
    coordinator, here, there = LocalCoordinator(), await filled(), await filled()
    purges = Purges(there.tiers, coordinator)
    there.disk.fault = "unavailable"
    disk = there.tiers.tiers[1]
    with capture_logs() as logs:
        listening = asyncio.create_task(purges.listen())
        for number in (1, 3):
            scope = PurgeScope(generation=KEYRING.tag("generation", f"generations/{number}"))
            assert not (await Purges(here.tiers, coordinator).purge(scope)).failed
        await until(lambda: asyncio.sleep(0, len(purges._owed.get("disk", ())) == 2))
        await purges._catch_up()
        there.disk.fault = ""
        assert await left(there.tiers) == [2], "of memory; the disk has what was purged, and works"
        await there.forget_in_memory(2, TENANTS["acme"])
        assert await left(there.tiers) == []
        there.clock += 10  # its breaker lets one try
        await there.tiers.call(disk, lambda: there.disk.usage())
        await purges._catch_up()
    assert await left(there.tiers) == [2]
    assert len(there.disk.values) == 1
    told = [line["log_level"] for line in logs if line.get("tier") == "disk"]
    assert told == ["warning", "info"], "once that it failed, once that it is done"
    listening.cancel()


async def test_what_a_tier_owes_is_bounded() -> None:
    bench = await filled()
    purges, disk = Purges(bench.tiers, LocalCoordinator()), bench.tiers.tiers[1]
    for number in range(module.MAX_OWED + 1):
        purges._owe(disk, PurgeScope(f"{number:04x}/"))
    assert purges._owed["disk"] == {PurgeScope()}
    upkeep = asyncio.create_task(purges.keep_up())
    await until(lambda: asyncio.sleep(0, not disk.unpurged))
    upkeep.cancel()
    assert not bench.disk.values
    assert await left(bench.tiers) == [1, 2], "in memory"


async def test_what_an_unpurged_tier_pushes_out_goes_nowhere() -> None:
    bench = Bench(disk_bytes=250)
    bench.tiers.tiers[1].unpurged = True
    for number in range(4):
        await bench.tiers.put(key(number), Entry(b"x"), TTL_S)
        await bench.tiers.flush()
    assert len(bench.disk.values) < 4
    assert not bench.objects.values


class Index:
    """Notes the scopes that it had to forget."""

    def __init__(self, able: bool = True) -> None:
        self.forgotten: list[PurgeScope] = []
        self._able = able

    async def forget(self, scope: PurgeScope) -> bool:
        self.forgotten.append(scope)
        return self._able


async def test_indexes_forget_on_every_replica_what_was_purged_on_one() -> None:
    coordinator, here, there = LocalCoordinator(), Index(), Index()
    listening = asyncio.create_task(Purges((await filled()).tiers, coordinator, [there]).listen())
    await Purges((await filled()).tiers, coordinator, [here]).purge(PurgeScope(generation=GENERATION))
    await until(lambda: asyncio.sleep(0, bool(there.forgotten)))
    assert here.forgotten == there.forgotten == [PurgeScope(generation=GENERATION)]
    listening.cancel()


async def test_an_index_that_could_not_be_cleared_is_named_and_the_others_are() -> None:
    unable, other = Index(able=False), Index()
    purges = Purges((await filled()).tiers, LocalCoordinator(), [unable, other])
    assert (await purges.purge(PurgeScope(TENANTS["acme"] + "/"))).failed == ["redis"]
    assert len(other.forgotten) == 1


async def test_a_purge_that_cannot_be_read_stops_no_other() -> None:
    coordinator, there = LocalCoordinator(), await filled()
    for odd in (b"\xff", b"[]", b'{"origin": "x"}', b'{"origin": "x", "prefix": "", "revision": "no"}'):
        await coordinator.append(module.STREAM, odd)
    listening = asyncio.create_task(Purges(there.tiers, coordinator).listen())
    with capture_logs() as logs:
        await Purges((await filled()).tiers, coordinator).purge(PurgeScope(generation=GENERATION))
        await until(lambda: asyncio.sleep(0, len(there.disk.values) == 1))
    assert [entry["event"] for entry in logs].count("a purge of another replica cannot be read") == 4
    listening.cancel()
