"""Executions of two replicas in this process that share a coordinator and a tier."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from safelight_server.cache.checkpoints import CheckpointPolicy, Checkpoints
from safelight_server.cache.pictures import PictureFacts, Pictures
from safelight_server.cluster import commit as commit_module
from safelight_server.cluster.bills import BILL
from safelight_server.cluster.bulletin import Bulletin
from safelight_server.cluster.leased_runner import LeasedRunner
from safelight_server.cluster.leased_runners import ExecutionTicket, LeasedRunners
from safelight_server.coordination.base import CommitOutcome, Lease
from safelight_server.domain.errors import InternalError
from safelight_server.domain.picture import Pixels
from safelight_server.engine.jobs import Job
from safelight_server.engine.latents import Snapshot
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.generations.execution import Execution
from safelight_server.runtime.base import RuntimeFailure
from safelight_server.runtime.simulated import LATENT, simulated_pipeline
from safelight_server.sampler import SamplerSpec, compile_table
from safelight_server.scheduler import Priority
from safelight_server.storage.base import StoreUnavailableError
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.sealed import Entry, Sealer
from safelight_server.storage.tiers import Tier, Tiers
from safelight_server.telemetry.metrics import TierMetrics
from structlog.testing import capture_logs

from tests.conftest import eventually
from tests.support.coordination import until
from tests.support.local_coordinator import LocalCoordinator
from tests.support.streams import Here
from tests.unit.test_cache_leadership import Outages
from tests.unit.test_execution import STEPS, Member, Stage

TTL_S = 1.0
"""Longer than a busy machine lets a process wait: leases are renewed by real time."""
FACTS = PictureFacts("x", "generations/a", "simulated/1", STEPS, 0.0)
NAME, POINTER = "ab01.exact", "ab01/picture/exact.pixels"


class Recorder(ExecutionObserver):
    """Keeps checkpoints, like the cache."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def wants_checkpoint(self, step: int) -> bool:
        return step % 2 == 0

    def checkpoint(self, snapshot: Snapshot) -> None:
        self.task = asyncio.create_task(self._checkpoints.keep("t", "exact", snapshot, STEPS, replicate=True))


class Replica:
    """A replica: an engine whose steps the test lets pass, and its leased runner."""

    def __init__(self, coordinator: Outages, tiers: Tiers, sealer: Sealer, keyring: Keyring) -> None:
        self.stage = Stage()
        self.checkpoints = Checkpoints(tiers, keyring, CheckpointPolicy(2))
        self.pictures = Pictures(tiers, keyring, Here(), 60.0)
        bulletin = Bulletin(coordinator, sealer)
        self.leased_runners = LeasedRunners(
            self.stage.engine, coordinator, sealer, self.checkpoints, self.pictures, bulletin, Here(), TTL_S, 60.0
        )
        self.tasks = [asyncio.create_task(work) for work in (bulletin.listen(), bulletin.talk())]
        self.leased_runner: LeasedRunner | None = None

    def execution(
        self, *, again: bool = False, generation: str = "generations/a", guided_steps: range | None = None
    ) -> Execution:
        pipeline = simulated_pipeline()
        table = compile_table(SamplerSpec("ddim", "trailing"), pipeline.schedule, "v_prediction", STEPS)
        scale, prompts = (1.0, ((1, 2),)) if guided_steps is None else (3.0, ((1, 2), (9, 9)))
        job = Job(0, "me", Priority.STANDARD, pipeline, LATENT, table, 7, scale, prompts, guided_steps=guided_steps)
        ticket = ExecutionTicket(NAME, POINTER, ("t", "exact"), "tenant", generation, "model/1", "miss", again)

        async def keep(pixels: Pixels, compute_s: float) -> bool:
            return await self.pictures.put(POINTER, pixels, FACTS, replicate=True)

        self.leased_runner = LeasedRunner(self.leased_runners, ticket, keep)
        return self.stage.executions.create(job, "same", Recorder(self.checkpoints), self.leased_runner)

    async def step(self, execution: Execution, step: int) -> None:
        await self.stage.step(execution, step)

    def run(self) -> None:
        for _ in range(100):
            self.stage.runtime.gate.release()

    async def close(self) -> None:
        self.run()
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        await self.leased_runners.close(0.0)
        await self.stage.engine.close()


class Pair:
    def __init__(self) -> None:
        self.coordinator = Outages()
        self.keyring = Keyring.random()
        self.sealer = Sealer(self.keyring)
        self.store = MemoryStore(1 << 24)
        self.store.name = "redis"  # type: ignore[misc]  # so that it counts as the shared tier
        metrics = TierMetrics(CollectorRegistry())
        tiers = [Tiers([Tier(self.store, shared=True)], self.sealer, metrics) for _ in range(2)]
        self.one, self.other = (Replica(self.coordinator, each, self.sealer, self.keyring) for each in tiers)

    async def bills(self) -> list[dict[str, object]]:
        return [json.loads(self.sealer.open(BILL, bill.data)[0].data) for bill in await self.coordinator.bills()]


@pytest.fixture
async def pair(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr(commit_module, "RETRY_S", 0.01)
    made = Pair()
    yield made
    made.coordinator.out = False
    await made.one.close()
    await made.other.close()


async def alone() -> Pixels:
    """The picture of an undisturbed execution."""
    stage = Stage()
    member, execution = Member(), stage.execution()
    execution.join(member)
    await stage.step(execution, STEPS)
    await eventually(lambda: member.picture is not None)
    await stage.engine.close()
    assert member.picture is not None
    return member.picture.pixels


async def test_the_second_replica_follows_and_one_bill_is_written(pair: Pair) -> None:
    leader, follower = Member(), Member()
    first, second = pair.one.execution(), pair.other.execution(generation="generations/b")
    first.join(leader)
    await pair.one.step(first, 1)
    second.join(follower)
    follower.watch(second)
    await eventually(lambda: pair.one.leased_runner is not None and pair.one.leased_runner.followed)
    await pair.one.step(first, 2)
    await eventually(lambda: follower.steps == [2])
    await pair.one.step(first, STEPS)
    await eventually(lambda: follower.picture is not None and leader.picture is not None)
    assert follower.picture is not None and leader.picture is not None
    assert np.array_equal(follower.picture.pixels, leader.picture.pixels)
    assert np.array_equal(leader.picture.pixels, await alone())
    assert [frame.step for frame in follower.frames][:1] == [2]
    assert (leader.counted, follower.counted, follower.rows) == (STEPS, 0, 0)
    [bill] = await pair.bills()
    assert (bill["generation"], bill["steps"], bill["rows"]) == ("generations/a", STEPS, STEPS)


async def test_what_nobody_follows_is_not_published(pair: Pair) -> None:
    member, execution = Member(), pair.one.execution()
    execution.join(member)
    member.watch(execution)
    await pair.one.step(execution, STEPS)
    await eventually(lambda: member.picture is not None)
    assert await pair.coordinator.read(NAME) == []
    assert member.frames


async def test_what_one_leaves_the_other_goes_on_with(pair: Pair) -> None:
    leader, follower = Member(), Member()
    first, second = pair.one.execution(), pair.other.execution()
    first.join(leader)
    await pair.one.step(first, 3)
    second.join(follower)
    first.leave(leader)
    pair.other.run()
    await eventually(lambda: follower.picture is not None)
    assert follower.picture is not None
    assert np.array_equal(follower.picture.pixels, await alone())
    assert follower.counted == STEPS - 3, "from where it was left"


async def test_a_dead_leader_is_replaced_from_the_newest_checkpoint(pair: Pair) -> None:
    leader, follower = Member(), Member()
    first, second = pair.one.execution(), pair.other.execution()
    first.join(leader)
    await pair.one.step(first, 3)
    second.join(follower)
    assert pair.one.leased_runner is not None and pair.one.leased_runner._leader is not None
    pair.one.leased_runner._leader._renewals.cancel()  # it stops renewing, like a dead process
    pair.other.run()
    await eventually(lambda: follower.picture is not None)
    assert follower.picture is not None
    assert np.array_equal(follower.picture.pixels, await alone())
    assert follower.counted == STEPS - 2
    pair.one.run()  # it was only frozen: its members get their picture, and nobody is billed twice
    await eventually(lambda: leader.picture is not None)
    await until(lambda: asyncio.sleep(0, not pair.one.leased_runners._tasks))
    assert len(await pair.bills()) == 1


@pytest.mark.parametrize(("guided_steps", "rows"), [(None, STEPS), (range(1, 3), STEPS + 2), (range(STEPS), 2 * STEPS)])
async def test_a_leader_that_died_between_picture_and_commit_is_billed_for(
    pair: Pair, guided_steps: range | None, rows: int
) -> None:
    pixels = await alone()
    await pair.one.pictures.put(POINTER, pixels, FACTS, replicate=True)
    member, execution = Member(), pair.other.execution(again=True, guided_steps=guided_steps)
    execution.join(member)
    await eventually(lambda: member.picture is not None)
    assert member.counted == 0, "no step was made"
    [bill] = await pair.bills()
    assert (bill["steps"], bill["rows"]) == (STEPS, rows)


async def test_without_the_service_it_runs_here_and_commits_later(pair: Pair) -> None:
    pair.coordinator.out = True
    member, execution = Member(), pair.one.execution()
    execution.join(member)
    await pair.one.step(execution, STEPS)
    await eventually(lambda: member.picture is not None)
    assert await pair.bills() == []
    pair.coordinator.out = False

    async def billed() -> bool:
        return len(await pair.bills()) == 1

    await until(billed)


async def developed_without_the_service(pair: Pair) -> None:
    pair.coordinator.out = True
    member, execution = Member(), pair.one.execution()
    execution.join(member)
    await pair.one.step(execution, STEPS)
    await eventually(lambda: member.picture is not None)


async def test_a_lease_that_nobody_knows_of_delays_the_commit_only(pair: Pair) -> None:
    """The answer to the call that took the lease was lost, so nobody will ever commit under it."""
    await developed_without_the_service(pair)
    assert await LocalCoordinator.acquire(pair.coordinator, NAME, "ghost", TTL_S) is not None
    pair.coordinator.out = False
    await until(pair.bills)
    await eventually(lambda: not pair.one.leased_runners._tasks)
    [bill] = await pair.bills()
    assert bill["steps"] == STEPS
    assert pair.one.leased_runners.num_late == 0


async def test_what_another_commits_meanwhile_counts(pair: Pair) -> None:
    await developed_without_the_service(pair)
    lease = await LocalCoordinator.acquire(pair.coordinator, NAME, "other", 60.0)
    assert lease is not None
    pair.coordinator.out = False
    await pair.other.pictures.put(POINTER, await alone(), FACTS, replicate=True)
    await pair.coordinator.commit(lease, POINTER, pair.sealer.seal(BILL, Entry(b'{"by": "other"}'), time.time() + 60))
    await eventually(lambda: not pair.one.leased_runners._tasks)
    assert await pair.bills() == [{"by": "other"}]


async def test_a_commit_whose_answer_was_lost_and_whose_result_was_forgotten_is_not_billed_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, outcomes = pair.coordinator.commit, []

    async def loses_its_first_answer(lease: Lease, pointer: str, bill: bytes) -> CommitOutcome:
        outcomes.append(await commit(lease, pointer, bill))
        if len(outcomes) == 1:
            result = await pair.coordinator.result(NAME)
            assert result is not None and await pair.coordinator.forget(NAME, result)
            pair.coordinator.out = True
            raise StoreUnavailableError("no answer in time")
        return outcomes[-1]

    monkeypatch.setattr(pair.coordinator, "commit", loses_its_first_answer)
    monkeypatch.setattr(commit_module, "COMMIT_WAIT_S", 0.05)
    member, execution = Member(), pair.one.execution()
    execution.join(member)
    pair.one.run()
    await eventually(lambda: member.picture is not None)
    pair.coordinator.out = False
    await eventually(lambda: not pair.one.leased_runners._tasks)
    assert outcomes == [CommitOutcome.COMMITTED] * 2
    assert await pair.coordinator.result(NAME) is not None
    assert len(await pair.bills()) == 1


async def test_without_the_service_for_too_long_the_result_is_discarded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_module, "GIVE_UP_S", 0.05)
    with capture_logs() as lines:
        await developed_without_the_service(pair)
        await eventually(lambda: not pair.one.leased_runners._tasks)
    assert [line["event"] for line in lines] == ["a result was not committed in time and is discarded"]
    pair.coordinator.out = False
    assert (await pair.bills(), await pair.coordinator.result(NAME)) == ([], None)
    assert pair.one.leased_runners.num_late == 0


async def test_a_picture_that_cannot_be_had_now_is_not_gone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result stays committed, and an execution that develops it again meanwhile is not billed."""
    first, execution = Member(), pair.one.execution()
    execution.join(first)
    pair.one.run()
    await eventually(lambda: first.picture is not None and not pair.one.leased_runners._tasks)
    result, get = await pair.coordinator.result(NAME), pair.store.get
    asked: list[str] = []

    async def fails_once(key: str) -> bytes | None:
        if key == POINTER and not asked:
            asked.append(key)
            raise StoreUnavailableError("no answer in time")
        return await get(key)

    monkeypatch.setattr(pair.store, "get", fails_once)
    member, execution = Member(), pair.other.execution()
    execution.join(member)
    pair.other.run()
    await eventually(lambda: member.picture is not None and not pair.other.leased_runners._tasks)
    assert asked
    assert await pair.coordinator.result(NAME) == result
    assert len(await pair.bills()) == 1


async def test_a_result_whose_picture_is_gone_is_computed_anew(pair: Pair) -> None:
    for number in (1, 2):
        member, execution = Member(), pair.one.execution()
        execution.join(member)
        pair.one.run()
        await eventually(lambda: member.picture is not None)
        assert len(await pair.bills()) == number
        await eventually(lambda: not pair.one.leased_runners._tasks)
        await pair.store.delete(POINTER)


async def test_failure_lets_those_who_follow_try_themselves(pair: Pair) -> None:
    leader, follower = Member(), Member()
    first, second = pair.one.execution(), pair.other.execution()
    first.join(leader)
    await pair.one.step(first, 1)
    second.join(follower)
    pair.one.stage.runtime.fail = RuntimeFailure("broken", retryable=False)
    pair.one.run()
    await eventually(lambda: leader.error is not None)
    pair.other.run()
    await eventually(lambda: follower.picture is not None)
    assert follower.error is None


@pytest.mark.parametrize("what", ["acquire", "result"])
async def test_what_nobody_has_thought_of_ends_the_output_and_not_only_its_task(pair: Pair, what: str) -> None:
    """Otherwise its generation would wait for ever."""

    async def raising(*_: object) -> None:
        raise ValueError("a malformed answer")

    other = await pair.coordinator.acquire(NAME, "other", 60.0) if what == "result" else None
    setattr(pair.coordinator, what, raising)
    member, execution = Member(), pair.one.execution()
    with capture_logs() as logs:
        execution.join(member)
        await eventually(lambda: member.error is not None)
    assert isinstance(member.error, InternalError)
    assert [entry["event"] for entry in logs] == ["bug"]
    assert not pair.one.leased_runners.asking and (other is None) == (what == "acquire")


async def test_an_event_of_another_form_is_passed_over(pair: Pair) -> None:
    lease = await pair.coordinator.acquire(NAME, "other", 60.0)
    assert lease is not None
    follower, execution = Member(), pair.one.execution()
    execution.join(follower)
    for facts in ({"step": "1"}, {"step": "x", "batch": "1"}, {"step": "2", "batch": "1"}):
        sealed = pair.sealer.seal(NAME, Entry(b"", facts), time.time() + 60)
        await pair.coordinator.publish(lease, sealed)
    await eventually(lambda: follower.steps == [2])
