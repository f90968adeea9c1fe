"""A lease kept alive while its work runs."""

import asyncio

from safelight_server.coordination.base import CommitOutcome, Lease
from safelight_server.coordination.leadership import Leadership
from safelight_server.storage.base import StoreUnavailableError

from tests.conftest import eventually
from tests.support.coordination import collect, until
from tests.support.local_coordinator import LocalCoordinator


class Outages(LocalCoordinator):
    """Fails while `out`; with `forgetful` it performs the call and then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.out = False
        self.forgetful = False
        self.renewals = 0

    async def renew(self, lease: Lease, ttl_s: float) -> bool:
        self._fail()
        self.renewals += 1
        return await super().renew(lease, ttl_s)

    async def acquire(self, name: str, owner: str, ttl_s: float) -> Lease | None:
        self._fail()
        return await super().acquire(name, owner, ttl_s)

    async def commit(self, lease: Lease, pointer: str, bill: bytes) -> CommitOutcome:
        self._fail()
        outcome = await super().commit(lease, pointer, bill)
        if self.forgetful:
            self.forgetful = False
            raise StoreUnavailableError("the answer was lost")
        return outcome

    async def append(self, name: str, data: bytes) -> str:
        self._fail()
        return await super().append(name, data)

    def _fail(self) -> None:
        if self.out:
            raise StoreUnavailableError("out")


async def lead(coordinator: LocalCoordinator, ttl_s: float = 0.06) -> Leadership:
    leader = await Leadership.take(coordinator, "x", ttl_s)
    assert leader is not None
    return leader


async def test_the_lease_lives_as_long_as_the_work() -> None:
    coordinator = Outages()
    coordinator._clock = lambda: 0.02 * coordinator.renewals  # three beats are the time of a lease, on any machine
    leader = await lead(coordinator)
    assert await Leadership.take(coordinator, "x", 0.06) is None
    await eventually(lambda: coordinator.renewals >= 5)
    assert await coordinator.holder("x") == leader.lease
    assert await leader.publish(b"1")
    assert await leader.commit("pointer", b"bill", 1.0) is CommitOutcome.COMMITTED
    await leader.close()
    assert await collect(coordinator, "x") == [b"1"]


async def test_closing_gives_it_back() -> None:
    coordinator = LocalCoordinator()
    await (await lead(coordinator, 60.0)).close()
    assert await coordinator.holder("x") is None


async def test_an_outage_loses_nothing_when_nobody_wanted_the_lease() -> None:
    coordinator = Outages()
    leader = await lead(coordinator)
    coordinator.out = True
    assert not await leader.publish(b"unseen")

    async def ended() -> bool:
        return await coordinator.holder("x") is None

    await until(ended)
    coordinator.out = False

    async def leads_again() -> bool:
        return await coordinator.holder("x") == leader.lease

    await until(leads_again)
    assert not leader.lost.is_set()
    assert await leader.publish(b"1")
    assert await leader.commit("pointer", b"bill", 1.0) is CommitOutcome.COMMITTED
    await leader.close()


async def test_one_who_was_replaced_learns_it_and_does_not_commit() -> None:
    coordinator = Outages()
    leader = await lead(coordinator)
    coordinator.out = True
    await until(lambda: LocalCoordinator.acquire(coordinator, "x", "other", 60.0))
    coordinator.out = False
    await eventually(leader.lost.is_set)
    assert not await leader.publish(b"late")
    assert await leader.commit("pointer", b"bill", 1.0) is CommitOutcome.FENCED
    await leader.close()
    assert await coordinator.bills() == []
    other = await coordinator.holder("x")
    assert other is not None and other.owner == "other", "closing does not release another's lease"


async def test_a_commit_waits_for_the_service_or_is_discarded() -> None:
    coordinator = Outages()
    leader = await lead(coordinator)
    coordinator.out = True
    assert await leader.commit("pointer", b"bill", 0.05) is None
    committing = asyncio.create_task(leader.commit("pointer", b"bill", 30.0))
    await asyncio.sleep(0)
    coordinator.out = False
    assert await committing is CommitOutcome.COMMITTED
    await leader.close()
    assert len(await coordinator.bills()) == 1


async def test_a_commit_whose_answer_was_lost_is_billed_once() -> None:
    coordinator = Outages()
    leader = await lead(coordinator)
    coordinator.forgetful = True
    assert await leader.commit("pointer", b"bill", 30.0) is CommitOutcome.COMMITTED
    await leader.close()
    assert len(await coordinator.bills()) == 1


async def test_after_its_commit_a_leader_has_lost_nothing() -> None:
    coordinator = Outages()
    leader = await lead(coordinator)
    assert await leader.commit("pointer", b"bill", 1.0) is CommitOutcome.COMMITTED
    await asyncio.sleep(0.1)  # several beats
    assert not leader.lost.is_set()
    await leader.close()


async def test_a_lease_that_another_had_and_let_go_is_lost() -> None:
    coordinator = Outages()
    leader = await lead(coordinator)
    coordinator.out = True
    await until(lambda: LocalCoordinator.acquire(coordinator, "x", "other", 60.0))
    theirs = await coordinator.holder("x")
    assert theirs is not None
    await coordinator.release(theirs)
    coordinator.out = False
    assert not await leader.confirm(), "the other may have decided what was to be decided"
    assert leader.lost.is_set() and not await leader.publish(b"late")
    assert await coordinator.read("x") == []
    await leader.close()


async def test_in_an_outage_it_is_not_held_beyond_its_time() -> None:
    coordinator = Outages()
    leader = await lead(coordinator)
    assert leader.held
    coordinator.out = True
    await eventually(lambda: not leader.held)
    assert not leader.lost.is_set()
    coordinator.out = False
    await eventually(lambda: leader.held)
    await leader.close()
