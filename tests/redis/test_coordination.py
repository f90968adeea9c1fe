"""Coordination through a real Redis, between replicas and with faults of Redis."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from safelight_server.coordination.base import BEGINNING, CommitOutcome, LeaderLostError, Renewal
from safelight_server.coordination.leadership import Leadership
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.storage.base import StoreFullError, StoreUnavailableError

from tests.conftest import eventually
from tests.support.coordination import SHORT_S, TTL_S, CoordinationRules, collect, until
from tests.support.redis_server import RedisServer

Replicas = Callable[..., RedisCoordinator]


class TestRedis(CoordinationRules):
    @pytest.fixture
    def coordinator(self, redis_server: RedisServer, replicas: Replicas) -> RedisCoordinator:
        return replicas(redis_server.url)


async def test_of_two_replicas_one_leads_and_the_other_follows(redis_server: RedisServer, replicas: Replicas) -> None:
    one, other = replicas(redis_server.url), replicas(redis_server.url)
    leader = await Leadership.take(one, "x", TTL_S)
    assert leader is not None
    assert await Leadership.take(other, "x", TTL_S) is None
    following = [asyncio.create_task(collect(other, "x")) for _ in range(10)]
    for number in range(100):
        assert await leader.publish(bytes([number]))
    assert await leader.commit("pointer", b"bill", 10) is CommitOutcome.COMMITTED
    for seen in await asyncio.gather(*following):
        assert seen == [bytes([number]) for number in range(100)]
    result = await other.result("x")
    assert result is not None and result.pointer == "pointer"
    await leader.close()


async def test_many_names_share_one_reader(redis_server: RedisServer, replicas: Replicas) -> None:
    one, other = replicas(redis_server.url), replicas(redis_server.url)
    leases = [await one.acquire(f"x{n}", "a", TTL_S) for n in range(100)]
    following = [asyncio.create_task(collect(other, f"x{n}")) for n in range(100)]
    for number, lease in enumerate(leases):
        assert lease is not None
        await one.publish(lease, bytes([number]))
        await one.commit(lease, "pointer", b"bill")
    assert await asyncio.gather(*following) == [[bytes([n])] for n in range(100)]
    assert len(await one._redis.client_list()) < 40


async def test_who_comes_during_a_read_of_others_misses_nothing(
    redis_server: RedisServer, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiting read began at the position of others; its events must come after the earlier ones."""
    monkeypatch.setattr("safelight_server.coordination.redis.BLOCK_S", 5.0)
    one, other = replicas(redis_server.url), replicas(redis_server.url)
    lease = await one.acquire("x", "a", TTL_S)
    assert lease is not None
    places = [await one.publish(lease, bytes([number])) for number in range(5)]
    ahead = asyncio.create_task(anext(aiter(other.follow("x", places[-1]))))

    async def reads() -> bool:
        return any(client["cmd"] == "xread" and "b" in client["flags"] for client in await one._redis.client_list())

    await until(reads)

    async def fails(_follower: object) -> None:
        raise StoreUnavailableError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(other, "_catch_up", fails)
        late = aiter(other.follow("x"))
        first = asyncio.create_task(anext(late))
        await eventually(lambda: len(other._followed) == 2)
    await one.publish(lease, bytes([5]))
    assert (await ahead).data == bytes([5])
    seen = [(await first).data] + [(await anext(late)).data for _ in range(5)]
    assert seen == [bytes([number]) for number in range(6)]


async def test_streams_are_bounded(redis_server: RedisServer, replicas: Replicas) -> None:
    coordinator = replicas(redis_server.url, max_events=100, max_bills=100)
    lease = await coordinator.acquire("x", "a", TTL_S)
    assert lease is not None
    for number in range(1000):
        await coordinator.publish(lease, str(number).encode())
    assert await coordinator._redis.xlen("safelight:run:events:x") < 300
    assert (await coordinator._redis.ttl("safelight:run:events:x")) > 0


async def test_takeover_from_a_leader_that_died(redis_server: RedisServer, replicas: Replicas) -> None:
    one, other = replicas(redis_server.url), replicas(redis_server.url)
    dead = await one.acquire("x", "dead", 0.3)
    assert dead is not None
    await one.publish(dead, b"1")
    place = BEGINNING
    with pytest.raises(LeaderLostError):
        async for event in other.follow("x"):
            place = event.place
    leaders = await asyncio.gather(*(Leadership.take(other, "x", TTL_S) for _ in range(5)))
    (leader,) = [taken for taken in leaders if taken is not None]
    await leader.publish(b"2")
    assert await one.commit(dead, "late", b"late") is CommitOutcome.FENCED
    assert await leader.commit("pointer", b"bill", 10) is CommitOutcome.COMMITTED
    assert await collect(other, "x", place) == [b"2"]
    assert [bill.data for bill in await one.bills()] == [b"bill"]
    await leader.close()


async def test_a_full_redis_commits_all_or_nothing(redis_server: RedisServer, replicas: Replicas) -> None:
    coordinator = replicas(redis_server.url)
    lease = await coordinator.acquire("x", "a", TTL_S)
    assert lease is not None
    await coordinator._redis.config_set("maxmemory", 1)
    with pytest.raises(StoreFullError):
        await coordinator.commit(lease, "pointer", b"bill")
    with pytest.raises(StoreFullError):
        await coordinator.acquire("y", "a", TTL_S)
    assert await coordinator.renew(lease, TTL_S), "a lease is kept in a full Redis"
    assert await coordinator.result("x") is None
    assert await coordinator.bills() == []
    assert await coordinator.holder("y") is None
    await coordinator._redis.config_set("maxmemory", 0)
    assert await coordinator.commit(lease, "pointer", b"bill") is CommitOutcome.COMMITTED
    assert len(await coordinator.bills()) == 1


async def test_a_hung_redis_costs_a_bounded_number_of_waits(redis_server: RedisServer, replicas: Replicas) -> None:
    coordinator = replicas(redis_server.url, timeout_s=0.5, open_s=60.0)
    lease = await coordinator.acquire("x", "a", TTL_S)
    assert lease is not None
    redis_server.freeze()
    for _ in range(50):
        with pytest.raises(StoreUnavailableError):
            await coordinator.holder("x")
    redis_server.thaw()


async def test_after_a_hang_the_answers_belong_to_their_questions(
    redis_server: RedisServer, replicas: Replicas
) -> None:
    coordinator = replicas(redis_server.url, timeout_s=0.5)
    leases = [await coordinator.acquire(f"x{n}", f"owner{n}", TTL_S) for n in range(20)]
    redis_server.freeze()
    await asyncio.gather(*(coordinator.holder(f"x{n}") for n in range(20)), return_exceptions=True)
    redis_server.thaw()

    async def works() -> bool:
        try:
            return await coordinator.holder("x0") is not None
        except StoreUnavailableError:
            return False

    await until(works)
    assert [await coordinator.holder(f"x{n}") for n in range(20)] == leases


async def test_a_leader_lives_through_a_restart_that_forgot_everything(
    redis_server: RedisServer, replicas: Replicas
) -> None:
    one, other = replicas(redis_server.url, timeout_s=1.0), replicas(redis_server.url, timeout_s=1.0)
    leader = await Leadership.take(one, "x", 0.3)
    assert leader is not None
    redis_server.kill()
    assert not await leader.publish(b"unseen")
    redis_server.start()

    async def leads_again() -> bool:
        try:
            return await other.holder("x") == leader.lease
        except StoreUnavailableError:
            return False

    await until(leads_again)
    assert await leader.commit("pointer", b"bill", 10) is CommitOutcome.COMMITTED
    await leader.close()
    assert len(await other.bills()) == 1


async def test_who_follows_waits_through_a_restart(redis_server: RedisServer, replicas: Replicas) -> None:
    redis_server.kill()
    redis_server._options = ("--appendonly", "yes", "--appendfsync", "always")
    redis_server.start()
    one, other = replicas(redis_server.url), replicas(redis_server.url)
    leader = await Leadership.take(one, "x", TTL_S)
    assert leader is not None
    assert await leader.publish(b"1")
    following = asyncio.create_task(collect(other, "x"))
    redis_server.kill()
    await asyncio.sleep(0)
    redis_server.start()

    async def published() -> bool:
        return await leader.publish(b"2")

    await until(published)
    assert await leader.commit("pointer", b"bill", 30) is CommitOutcome.COMMITTED
    assert await following == [b"1", b"2"]
    await leader.close()


async def test_a_hundred_executions_on_two_replicas_while_redis_dies(
    redis_server: RedisServer, replicas: Replicas
) -> None:
    """Each execution is computed at least once, and committed and billed exactly once."""
    redis_server.kill()
    redis_server._options = ("--appendonly", "yes", "--appendfsync", "always")
    redis_server.start()
    pair = [replicas(redis_server.url, timeout_s=1.0) for _ in range(2)]

    async def compute(coordinator: RedisCoordinator, name: str) -> None:
        while True:
            try:
                if await coordinator.result(name) is not None:
                    return
                leader = await Leadership.take(coordinator, name, 0.5)
            except StoreUnavailableError:
                await asyncio.sleep(0.05)
                continue
            if leader is None:
                await asyncio.sleep(0.05)
                continue
            await leader.publish(b"step")
            await leader.commit(f"picture of {name}", name.encode(), 20)
            await leader.close()

    async def disturb() -> None:
        for _ in range(2):
            await asyncio.sleep(0.1)
            await asyncio.to_thread(redis_server.kill)
            await asyncio.to_thread(redis_server.start)

    work = [compute(coordinator, f"x{n}") for n in range(100) for coordinator in pair]
    await asyncio.gather(disturb(), *work)
    bills = sorted([bill.data for bill in await pair[0].bills()])
    assert bills == sorted(f"x{n}".encode() for n in range(100))


async def test_everything_about_a_name_is_forgotten_in_the_end(redis_server: RedisServer, replicas: Replicas) -> None:
    coordinator = replicas(redis_server.url, memory_s=1.0)
    lease = await coordinator.acquire("x", "a", SHORT_S)
    assert lease is not None
    await coordinator.publish(lease, b"1")
    await coordinator.commit(lease, "pointer", b"bill")
    await coordinator.append("news", b"1")

    async def forgotten() -> bool:
        return sorted(await coordinator._redis.keys()) == [b"safelight:run:bills", b"safelight:run:fence"]

    await until(forgotten)


class Process:
    """`tests.support.leader` in a process of its own."""

    def __init__(self, server: RedisServer) -> None:
        command = [sys.executable, "-m", "tests.support.leader", server.url, "x", "0.5"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    async def says(self) -> str:
        assert self._process.stdout is not None
        return (await asyncio.to_thread(self._process.stdout.readline)).strip()

    def commit(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def process(redis_server: RedisServer) -> Iterator[Process]:
    process = Process(redis_server)
    yield process
    process.end()


async def take_over(coordinator: RedisCoordinator) -> tuple[Leadership, list[bytes]]:
    """Follows until the leader is lost, then leads; returns the events seen before."""
    seen = []
    with pytest.raises(LeaderLostError):
        async for event in coordinator.follow("x"):
            seen.append(event.data)
    leader = await Leadership.take(coordinator, "x", TTL_S)
    assert leader is not None
    return leader, seen


async def test_a_leader_killed_with_9_is_replaced(
    redis_server: RedisServer, replicas: Replicas, process: Process
) -> None:
    coordinator = replicas(redis_server.url)
    assert await process.says() == "leading"
    process.signal(signal.SIGKILL)
    leader, seen = await take_over(coordinator)
    assert set(seen) <= {b"theirs"}
    assert await leader.commit("ours", b"ours", 10) is CommitOutcome.COMMITTED
    assert [bill.data for bill in await coordinator.bills()] == [b"ours"]
    await leader.close()


async def test_a_leader_that_was_frozen_past_its_lease_writes_nothing_any_more(
    redis_server: RedisServer, replicas: Replicas, process: Process
) -> None:
    coordinator = replicas(redis_server.url)
    assert await process.says() == "leading"
    process.signal(signal.SIGSTOP)
    leader, seen = await take_over(coordinator)
    process.commit()
    process.signal(signal.SIGCONT)
    assert await process.says() == "fenced"
    assert await leader.publish(b"ours")
    assert await leader.commit("ours", b"ours", 10) is CommitOutcome.COMMITTED
    result = await coordinator.result("x")
    assert result is not None and result.pointer == "ours"
    assert [bill.data for bill in await coordinator.bills()] == [b"ours"]
    assert await collect(coordinator, "x") == [*seen, b"ours"], "nothing of the old leader after the new one's lease"
    await leader.close()


async def test_a_renewal_tells_that_redis_has_lost_its_memory(redis_server: RedisServer, replicas: Replicas) -> None:
    one = replicas(redis_server.url)
    lease = await one.acquire("x", "a", TTL_S)
    assert lease is not None
    assert await one.renew(lease, TTL_S) is Renewal.HELD
    await one._redis.flushall()
    assert await one.renew(lease, TTL_S) is Renewal.FORGOTTEN
    assert await one.renew(lease, TTL_S) is Renewal.HELD
    await one.publish(lease, b"as before")
    await one._redis.flushall()
    other = await one.acquire("x", "b", TTL_S)
    assert other is not None and await one.renew(lease, TTL_S) is Renewal.LOST
    await one.release(other)
    assert await one.renew(lease, TTL_S) is Renewal.LOST
