"""Purges by tenant, model revision, generation and age."""

import asyncio

import pytest
from safelight_server.storage import base
from safelight_server.storage.purge import PurgeScope, purge
from safelight_server.storage.sealed import Entry
from safelight_server.storage.tiers import Tiers

from tests.support.stores import TTL_S, key
from tests.unit.test_cache_tiers import KEYRING, Bench

TENANTS = {name: KEYRING.tenant(name) for name in ("acme", "initech")}


async def filled() -> Bench:
    bench = Bench()
    for number in range(40):
        tenant = TENANTS["acme" if number % 2 else "initech"]
        revision = KEYRING.tag("revision", "icons/1" if number < 20 else "icons/2")
        generation = KEYRING.tag("generation", f"generations/{number % 10}")
        await bench.tiers.put(key(number, tenant), Entry(b"x", {}, revision, generation), TTL_S * (1 + number % 3))
    await bench.tiers.flush()
    bench.objects.values = dict(bench.disk.values)
    return bench


async def left(tiers: Tiers) -> list[int]:
    names = [(key(number, tenant), number) for number in range(40) for tenant in TENANTS.values()]
    return sorted([number for name, number in names if await tiers.get(name) is not None])


@pytest.mark.parametrize(
    ("scope", "gone"),
    [
        (PurgeScope(TENANTS["acme"] + "/"), lambda n: n % 2 == 1),
        (PurgeScope(revision=KEYRING.tag("revision", "icons/1")), lambda n: n < 20),
        (PurgeScope(generation=KEYRING.tag("generation", "generations/3")), lambda n: n % 10 == 3),
        (
            PurgeScope(TENANTS["acme"] + "/", revision=KEYRING.tag("revision", "icons/2")),
            lambda n: n % 2 == 1 and n >= 20,
        ),
        (PurgeScope(expired_at=1000.0 + TTL_S), lambda n: n % 3 == 0),
        (PurgeScope(), lambda n: True),
        (PurgeScope(generation=KEYRING.tag("generation", "generations/unknown")), lambda n: False),
    ],
)
async def test_what_is_covered_goes_from_every_tier_and_nothing_else(scope, gone) -> None:  # type: ignore[no-untyped-def]
    bench = await filled()
    report = await purge(bench.tiers, scope)
    expected = [number for number in range(40) if gone(number)]
    assert report.deleted == dict.fromkeys(("memory", "disk", "objects"), len(expected))
    assert report.failed == []
    assert await left(bench.tiers) == [number for number in range(40) if not gone(number)]


async def test_a_tier_that_cannot_is_named() -> None:
    bench = await filled()
    bench.objects.fault = "unavailable"
    report = await purge(bench.tiers, PurgeScope(TENANTS["acme"] + "/"))
    assert report.failed == ["objects"]
    assert report.deleted["disk"] == 20


async def test_a_listing_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "STALL_S", 0.01)
    bench = await filled()
    bench.objects.fault = "hangs"
    assert (await purge(bench.tiers, PurgeScope(TENANTS["acme"] + "/"))).failed == ["objects"]


async def test_nothing_comes_back_from_what_moves_meanwhile() -> None:
    bench = await filled()
    name = key(1, TENANTS["acme"])
    await bench.memory.delete(name)

    async def looks() -> None:
        for _ in range(200):
            await bench.tiers.get(name)
            await asyncio.sleep(0)

    looking = asyncio.create_task(looks())
    await asyncio.sleep(0)
    assert (await purge(bench.tiers, PurgeScope(TENANTS["acme"] + "/"))).failed == []
    await looking
    await bench.tiers.flush()
    assert await bench.tiers.get(name) is None


async def test_what_waits_to_be_written_goes_too() -> None:
    bench = Bench(memory_bytes=1)
    await bench.tiers.put(key(1, TENANTS["acme"]), Entry(b"x"), TTL_S)
    await purge(bench.tiers, PurgeScope(TENANTS["acme"] + "/"))
    await bench.tiers.flush()
    assert not bench.disk.values


async def test_garbage_without_a_header_goes_with_whatever_looks_at_it() -> None:
    bench = await filled()
    bench.disk.values[key(99)] = b"garbage"
    await purge(bench.tiers, PurgeScope(generation=b"whatever"))
    assert key(99) not in bench.disk.values


async def test_one_tier_only() -> None:
    bench = await filled()
    report = await purge(bench.tiers, PurgeScope(expired_at=1000.0 + TTL_S), only="disk")
    assert set(report.deleted) == {"disk"}
    assert len(bench.objects.values) == 40
