"""The tiers: where entries are found, how they move, and that no fault ever reaches the caller."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safelight_server.storage.breaker import Breaker, BreakerState
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import ENTRY_BYTES, MemoryStore
from safelight_server.storage.purge import PurgeScope, purge
from safelight_server.storage.sealed import Entry, Sealer
from safelight_server.storage.tiers import OFFLOAD_BYTES, Tier, Tiers
from structlog.testing import capture_logs

from tests.support.stores import TTL_S, FaultyStore, Numbers, key

KEYRING = Keyring.random()


class Bench:
    """Memory, an eager disk and lazy, shared objects."""

    def __init__(self, memory_bytes: int = 1 << 20, disk_bytes: int = 1 << 20, waiting_bytes: int = 1 << 20) -> None:
        self.now = 1000.0
        self.numbers = Numbers()
        self.sealer = Sealer(KEYRING)
        self.memory = MemoryStore(memory_bytes)
        self.disk = FaultyStore("disk", disk_bytes)
        self.objects = FaultyStore("objects")
        self.clock = 0.0
        self.breakers = [Breaker(name, 0.5, 3, 1.0, clock=lambda: self.clock) for name in ("disk", "objects")]
        self.tiers = Tiers(
            [
                Tier(self.memory),
                Tier(self.disk, self.breakers[0]),
                Tier(self.objects, self.breakers[1], eager=False, shared=True),
            ],
            self.sealer,
            self.numbers.metrics,
            waiting_bytes,
            now=lambda: self.now,
        )

    async def data(self, number: int) -> tuple[bytes, str] | None:
        found = await self.tiers.get(key(number))
        return None if found is None else (found.entry.data, found.tier)

    async def forget_in_memory(self, number: int, tenant: str = "ab01") -> None:
        await self.memory.delete(key(number, tenant))


async def test_what_was_put_is_in_memory_at_once_and_on_disk_soon() -> None:
    bench = Bench()
    assert not await bench.tiers.put(key(1), Entry(b"x"), TTL_S)
    assert await bench.data(1) == (b"x", "memory")
    await bench.tiers.flush()
    assert set(bench.disk.values) == {key(1)}
    assert not bench.objects.values


async def test_what_is_found_below_moves_up_off_the_path() -> None:
    bench = Bench()
    await bench.tiers.put(key(1), Entry(b"x"), TTL_S)
    await bench.tiers.flush()
    bench.objects.values, bench.disk.values = bench.disk.values, {}
    await bench.forget_in_memory(1)
    assert await bench.data(1) == (b"x", "objects")
    await bench.tiers.flush()
    assert set(bench.disk.values) == {key(1)}
    assert await bench.data(1) == (b"x", "memory")
    assert bench.numbers.gets("objects", "hit") == 1
    assert bench.numbers.gets("disk", "miss") == 1


async def test_what_the_disk_pushes_out_goes_down() -> None:
    bench = Bench(memory_bytes=1, disk_bytes=300)
    for number in range(4):
        await bench.tiers.put(key(number), Entry(bytes([number]) * 50), TTL_S)
    await bench.tiers.flush()
    await bench.tiers.flush()
    assert set(bench.disk.values) == {key(2), key(3)}
    assert set(bench.objects.values) == {key(0), key(1)}
    assert bench.numbers.errors("memory", "too_large") == 4
    assert await bench.data(0) == (bytes(50), "objects")


async def test_what_came_from_below_is_not_written_there_again() -> None:
    bench = Bench(memory_bytes=2 * (ENTRY_BYTES + 200))
    await bench.tiers.put(key(1), Entry(b"x" * 20), TTL_S)
    await bench.tiers.flush()
    bench.objects.values = dict(bench.disk.values)
    bench.disk.on_evict(key(1), bench.disk.values[key(1)])  # type: ignore[misc]
    puts: list[str] = []

    async def put(name: str, value: bytes, ttl_s: float) -> None:
        puts.append(name)

    bench.objects.put = put  # type: ignore[method-assign]
    await bench.tiers.flush()
    assert puts == []


async def test_a_listing_may_take_longer_than_a_call() -> None:
    bench = Bench()
    bench.tiers = Tiers(
        [Tier(bench.memory), Tier(bench.disk, Breaker("disk", 0.02, 1))], bench.sealer, bench.numbers.metrics
    )
    for number in range(10):
        await bench.tiers.put(key(number), Entry(b"x"), TTL_S)
        await bench.forget_in_memory(number)
    await bench.tiers.flush()
    listed = bench.disk.keys

    async def slowly(prefix: str = "") -> AsyncIterator[str]:
        async for name in listed(prefix):
            await asyncio.sleep(0.01)
            yield name

    bench.disk.keys = slowly  # type: ignore[method-assign]
    assert len(await bench.tiers.keys("", 100)) == 10
    assert bench.tiers.tiers[1].breaker.state is BreakerState.CLOSED  # type: ignore[union-attr]
    assert len(await bench.tiers.keys("", 3)) == 3
    bench.disk.fault = "unavailable"
    await bench.tiers.put(key(10), Entry(b"x"), TTL_S)
    assert await bench.tiers.keys("", 100) == [key(10)]
    assert bench.numbers.errors("disk", "unavailable") >= 1


async def test_a_value_on_its_way_is_never_nowhere() -> None:
    bench = Bench(memory_bytes=1)
    await bench.tiers.put(key(1), Entry(b"x"), TTL_S)
    assert not bench.disk.values
    assert await bench.data(1) == (b"x", "disk")


async def test_a_corrupt_entry_is_dropped_counted_and_looked_for_below() -> None:
    bench = Bench()
    await bench.tiers.put(key(1), Entry(b"right"), TTL_S)
    await bench.tiers.flush()
    bench.objects.values = dict(bench.disk.values)
    bench.disk.values[key(1)] = bench.disk.values[key(1)][:-1] + b"?"
    await bench.forget_in_memory(1)
    assert await bench.data(1) == (b"right", "objects")
    assert bench.numbers.gets("disk", "corrupt") == 1
    await bench.tiers.flush()
    assert bench.disk.values == bench.objects.values, "the right one is there again"


async def test_a_value_of_another_key_is_corrupt() -> None:
    bench = Bench()
    await bench.tiers.put(key(1), Entry(b"theirs"), TTL_S)
    await bench.tiers.flush()
    bench.disk.values[key(2)] = bench.disk.values[key(1)]
    assert await bench.data(2) is None
    assert key(2) not in bench.disk.values


async def test_an_entry_that_has_expired_is_not_served_and_goes() -> None:
    bench = Bench()
    await bench.tiers.put(key(1), Entry(b"x"), TTL_S)
    await bench.tiers.flush()
    bench.now += TTL_S
    assert await bench.data(1) is None
    assert not bench.disk.values
    assert (await bench.memory.usage()).entries == 0


async def test_moving_up_does_not_make_an_entry_younger() -> None:
    bench = Bench()
    await bench.tiers.put(key(1), Entry(b"x"), TTL_S)
    await bench.tiers.flush()
    await bench.forget_in_memory(1)
    bench.now += TTL_S - 1
    assert await bench.data(1) == (b"x", "disk")
    await bench.tiers.flush()
    bench.now += 1
    assert await bench.data(1) is None


async def test_large_values_are_sealed_beside_the_loop_and_come_back() -> None:
    bench = Bench()
    data = bytes(OFFLOAD_BYTES + 1)
    await bench.tiers.put(key(1), Entry(data), TTL_S)
    assert await bench.data(1) == (data, "memory")


@pytest.mark.parametrize("fault", ["unavailable", "full", "hangs"])
async def test_no_fault_of_a_tier_reaches_the_caller(fault: str) -> None:
    bench = Bench()
    await bench.tiers.put(key(0), Entry(b"0"), TTL_S)
    await bench.tiers.flush()
    bench.disk.fault = bench.objects.fault = fault
    for number in range(1, 6):
        await bench.tiers.put(key(number), Entry(b"x"), TTL_S)
        assert await bench.data(number) == (b"x", "memory")
    await bench.tiers.flush()
    await bench.forget_in_memory(1)
    assert await bench.data(1) is None
    await bench.tiers.measure()
    assert not await bench.tiers.put(key(7), Entry(b"x"), TTL_S, replicate=True)
    reason = "full" if fault == "full" else "unavailable"
    assert bench.numbers.errors("disk", reason) >= 1
    assert await bench.tiers.delete(key(0)) is (fault == "full")


async def test_a_tier_that_fails_is_asked_again_later() -> None:
    bench = Bench()
    bench.disk.fault = "hangs"
    for number in range(10):
        await bench.data(number)
    calls = bench.disk.calls
    assert calls == 3
    assert bench.numbers.errors("disk", "left_alone") == 7
    bench.disk.fault = ""
    bench.clock += 1.0
    await bench.data(1)
    await bench.tiers.put(key(1), Entry(b"x"), TTL_S)
    await bench.tiers.flush()
    assert bench.disk.values


async def test_the_log_says_once_that_a_tier_is_full_and_once_that_it_has_room() -> None:
    bench = Bench()
    bench.disk.fault = "full"
    with capture_logs() as lines:
        for number in range(5):
            await bench.tiers.put(key(number), Entry(b"x"), TTL_S)
            await bench.tiers.flush()
        bench.disk.fault = ""
        for number in range(5):
            await bench.tiers.put(key(number), Entry(b"x"), TTL_S)
            await bench.tiers.flush()
    assert [line["log_level"] for line in lines] == ["warning", "info"]


async def test_replicated_means_that_a_shared_tier_has_it() -> None:
    bench = Bench()
    assert await bench.tiers.put(key(1), Entry(b"x"), TTL_S, replicate=True)
    assert set(bench.objects.values) == {key(1)}
    bench.objects.fault = "unavailable"
    assert not await bench.tiers.put(key(2), Entry(b"x"), TTL_S, replicate=True)
    assert await bench.data(2) == (b"x", "memory")


async def test_fresh_means_what_others_wrote_before_what_is_here() -> None:
    bench, other = Bench(), Bench()
    for number, data in ((1, b"old"), (2, b"mine")):
        await bench.tiers.put(key(number), Entry(data), TTL_S)
    await other.tiers.put(key(1), Entry(b"new"), TTL_S, replicate=True)
    bench.objects.values = other.objects.values
    found = await bench.tiers.get(key(1), fresh=True)
    assert found is not None and (found.entry.data, found.tier) == (b"new", "objects")
    assert await bench.data(1) == (b"old", "memory"), "nothing moved up"
    mine = await bench.tiers.get(key(2), fresh=True)
    assert mine is not None and mine.tier == "memory"
    bench.objects.fault = "unavailable"
    local = await bench.tiers.get(key(1), fresh=True)
    assert local is not None and local.entry.data == b"old"


async def test_writes_that_wait_are_bounded() -> None:
    bench = Bench(waiting_bytes=500)
    bench.disk.fault = "hangs"
    for number in range(20):
        await bench.tiers.put(key(number), Entry(bytes(100)), TTL_S)
    assert bench.numbers.dropped("disk") >= 15
    assert await bench.data(19) == (bytes(100), "memory")


async def test_a_deleted_entry_does_not_come_back_from_a_move() -> None:
    bench = Bench()
    for number in range(20):
        await bench.tiers.put(key(number), Entry(b"x"), TTL_S)
        if number % 2:
            await asyncio.sleep(0)
        assert await bench.tiers.delete(key(number))
    await bench.tiers.flush()
    assert not bench.disk.values
    assert (await bench.memory.usage()).entries == 0


async def test_what_was_found_while_it_was_deleted_does_not_move_up() -> None:
    bench = Bench()
    await bench.tiers.put(key(1), Entry(b"x"), TTL_S)
    await bench.tiers.flush()
    await bench.forget_in_memory(1)
    found, _ = await asyncio.gather(bench.tiers.get(key(1)), bench.tiers.delete(key(1)))
    assert found is not None, "the lookup came first"
    await bench.tiers.flush()
    assert await bench.data(1) is None


async def test_closing_stops_what_moves() -> None:
    bench = Bench()
    await bench.tiers.put(key(1), Entry(b"x"), TTL_S)
    bench.disk.fault = "hangs"
    await asyncio.sleep(0)
    await bench.tiers.close()
    assert len(asyncio.all_tasks()) == 1


class TiersMachine(RuleBasedStateMachine):
    """Any order of puts, gets, deletes, purges, faults and damage: every served value was put and not deleted."""

    numbers = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.bench = self.run(self.make())
        self.served: dict[int, set[bytes]] = {}
        self.counter = itertools.count()

    @staticmethod
    async def make() -> Bench:
        return Bench(memory_bytes=2 * (ENTRY_BYTES + 200), disk_bytes=500, waiting_bytes=600)

    def run(self, work):  # type: ignore[no-untyped-def]
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.bench.tiers.close())
        self.runner.close()

    @rule(number=numbers, size=st.integers(0, 200), replicate=st.booleans())
    def put(self, number: int, size: int, replicate: bool) -> None:
        data = f"{next(self.counter)}".encode() + bytes(size)
        self.run(self.bench.tiers.put(key(number), Entry(data, {}, b"revision", bytes([number]) * 8), TTL_S, replicate))
        self.served.setdefault(number, set()).add(data)

    @rule(number=numbers)
    def get(self, number: int) -> None:
        found = self.run(self.bench.data(number))
        assert found is None or found[0] in self.served.get(number, ())

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        if self.run(self.bench.tiers.delete(key(number))):
            self.served.pop(number, None)

    @rule(number=numbers)
    def purge_generation(self, number: int) -> None:
        if not self.run(purge(self.bench.tiers, PurgeScope(generation=bytes([number]) * 8))).failed:
            self.served.pop(number, None)

    @rule()
    def flush(self) -> None:
        self.run(self.bench.tiers.flush())

    @rule(tier=st.sampled_from(["disk", "objects"]), fault=st.sampled_from(["", "", "full", "unavailable"]))
    def fault(self, tier: str, fault: str) -> None:
        getattr(self.bench, tier).fault = fault
        self.bench.clock += 0.6

    @precondition(lambda self: self.bench.disk.values or self.bench.objects.values)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        store = data.draw(st.sampled_from([s for s in (self.bench.disk, self.bench.objects) if s.values]))
        name = data.draw(st.sampled_from(sorted(store.values)))
        value = bytearray(store.values[name])
        value[data.draw(st.integers(0, len(value) - 1))] ^= data.draw(st.integers(1, 255))
        store.values[name] = bytes(value)

    @rule(seconds=st.sampled_from([1.0, TTL_S]))
    def time_passes(self, seconds: float) -> None:
        self.bench.now += seconds
        if seconds == TTL_S:
            self.served.clear()

    @invariant()
    def bounds_hold(self) -> None:
        assert self.run(self.bench.memory.usage()).num_bytes <= 2 * (ENTRY_BYTES + 200)
        assert sum(map(len, self.bench.disk.values.values())) <= 500


TestTiersMachine = TiersMachine.TestCase
TestTiersMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
