"""Single flight: identical outputs share one execution, and each keeps what is its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from safelight_server.domain.component import Component
from safelight_server.domain.errors import SafelightError, UnavailableError
from safelight_server.domain.picture import FinishedPicture
from safelight_server.engine.engine import Engine
from safelight_server.engine.jobs import Job
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.generations.execution import Execution, Executions
from safelight_server.preview import Frame
from safelight_server.runtime.base import RuntimeFailure
from safelight_server.runtime.simulated import LATENT, SimulatedRuntime, simulated_pipeline
from safelight_server.sampler import SamplerSpec, compile_table
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Metrics

from tests.conftest import eventually
from tests.support.streams import Here

STEPS = 5


@dataclass(eq=False)
class Member:
    """Records the reports that it gets."""

    priority: Priority = Priority.STANDARD
    deadline: float | None = None
    heard: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    picture: FinishedPicture | None = None
    error: SafelightError | None = None
    rows: int = 0
    counted: int = 0
    skipped: int = 0

    def started(self) -> None:
        self.heard.append("started")

    def joined(self, step: int) -> None:
        self.heard.append(f"joined {step}")

    def watch(self, execution: Execution) -> None:
        """Takes every frame, like a stream."""
        self.feed = execution.feed
        self.frames += [] if self.feed.newest is None else [self.feed.newest]
        self.feed.subscribe(id(self), 1, self.offer)

    def offer(self, step: int) -> float:
        assert self.feed.newest is not None
        self.frames.append(self.feed.newest)
        return step + 1

    def used(self, seconds: float, rows: int, steps: int, rows_skipped: int) -> None:
        self.rows += rows
        self.counted += steps
        self.skipped += rows_skipped

    def stepped(self, step: int, batch_size: int) -> None:
        self.steps.append(step)

    def developed(self, picture: FinishedPicture) -> None:
        self.picture = picture

    def failed(self, error: SafelightError) -> None:
        self.error = error

    def expired(self) -> None:
        self.heard.append("expired")


class GatedRuntime(SimulatedRuntime):
    """Denoiser calls wait until the test lets them pass one by one; decoder calls wait while `decodes` is clear."""

    def __init__(self) -> None:
        super().__init__(1, 0.0, 0.0)
        self.gate = asyncio.Semaphore(0)
        self.decodes = asyncio.Event()
        self.decodes.set()
        self.fail: RuntimeFailure | None = None
        self.calls: list[tuple[Component, int]] = []

    async def run(self, instance, model, component, inputs):  # type: ignore[no-untyped-def]  # as the protocol
        self.calls.append((component, len(next(iter(inputs.values())))))
        if component is Component.DENOISER:
            await self.gate.acquire()
            if self.fail is not None:
                raise self.fail
        elif component is Component.DECODER:
            await self.decodes.wait()
        return await super().run(instance, model, component, inputs)


class Stage:
    def __init__(self) -> None:
        self.runtime = GatedRuntime()
        self.engine = Engine(self.runtime, asyncio.get_running_loop().time, Metrics(), max_running=4)
        self.executions = Executions(self.engine, Here())

    def execution(
        self,
        key: str | None = "same",
        seed: int = 7,
        recorder: ExecutionObserver | None = None,
        token_ids: tuple[int, ...] = (1, 2),
        guided_steps: range | None = None,
    ) -> Execution:
        pipeline = simulated_pipeline()
        table = compile_table(SamplerSpec("ddim", "trailing"), pipeline.schedule, "v_prediction", STEPS)
        scale, prompts = (1.0, (token_ids,)) if guided_steps is None else (3.0, (token_ids, (9, 9)))
        job = Job(0, "me", Priority.STANDARD, pipeline, LATENT, table, seed, scale, prompts, guided_steps=guided_steps)
        execution = self.executions.create(job, key, recorder)
        self.executions.publish(execution)
        return execution

    async def step(self, execution: Execution, step: int) -> None:
        for _ in range(step - execution.step):
            self.runtime.gate.release()
        await eventually(lambda: execution.step == step)


@pytest.fixture
async def stage():
    made = Stage()
    yield made
    made.runtime.decodes.set()
    for _ in range(100):
        made.runtime.gate.release()
    await made.engine.close()


async def test_a_newcomer_takes_its_first_step_in_the_call_after_its_prompt_is_encoded(stage: Stage) -> None:
    first = stage.execution("first")
    first.join(Member())
    await eventually(lambda: stage.runtime.calls[-1:] == [(Component.DENOISER, 1)])
    second = stage.execution("second", token_ids=(3, 4))
    second.join(Member())
    await stage.step(first, 1)
    await eventually(lambda: stage.runtime.calls[-1][0] is Component.DENOISER and len(stage.runtime.calls) == 4)
    assert stage.runtime.calls[2:] == [(Component.TEXT_ENCODER, 1), (Component.DENOISER, 2)]


async def test_a_second_member_shares_the_work_and_joins_where_it_is(stage: Stage) -> None:
    first, second = Member(), Member()
    execution = stage.execution()
    execution.join(first)
    first.watch(execution)
    await stage.step(execution, 2)
    assert stage.executions.find("same") is execution
    execution.join(second)
    second.watch(execution)
    assert second.heard == ["started", "joined 2"]
    assert second.frames == [first.frames[-1]], "it sees the newest preview at once"
    await stage.step(execution, STEPS)
    await eventually(lambda: second.picture is not None)
    assert first.picture is second.picture
    assert (first.steps, second.steps) == ([1, 2, 3, 4, 5], [3, 4, 5])
    assert stage.executions.find("same") is None


async def test_work_counts_once_for_the_member_that_came_first_and_is_still_there(stage: Stage) -> None:
    first, second = Member(), Member()
    execution = stage.execution()
    execution.join(first)
    execution.join(second)
    await stage.step(execution, 2)
    execution.leave(first)
    await stage.step(execution, STEPS)
    await eventually(lambda: second.picture is not None)
    assert (first.counted, second.counted) == (2, 3)
    assert first.rows + second.rows == STEPS
    assert first.picture is None
    assert first.steps == [1, 2]


async def test_rows_outside_of_the_guidance_interval_are_skipped_and_counted(stage: Stage) -> None:
    member, execution = Member(), stage.execution(guided_steps=range(1, 3))
    execution.join(member)
    await stage.step(execution, STEPS)
    await eventually(lambda: member.picture is not None)
    assert [rows for component, rows in stage.runtime.calls if component is Component.DENOISER] == [1, 2, 2, 1, 1]
    assert (member.rows, member.skipped) == (STEPS + 2, STEPS - 2)


async def test_it_stops_only_when_the_last_member_leaves(stage: Stage) -> None:
    first, second = Member(), Member()
    execution = stage.execution()
    execution.join(first)
    execution.join(second)
    await stage.step(execution, 1)
    execution.leave(second)
    assert stage.engine.scheduler.num_outputs == 1
    execution.leave(first)
    assert stage.engine.scheduler.num_outputs == 0
    assert stage.executions.find("same") is None


async def test_who_comes_back_goes_on_from_where_it_stopped(stage: Stage) -> None:
    member = Member()
    execution = stage.execution()
    execution.join(member)
    await stage.step(execution, 3)
    execution.leave(member, back=True)
    assert stage.engine.scheduler.num_outputs == 0
    assert stage.executions.find("same") is execution, "others may join what is kept"
    stage.runtime.gate.release()  # the result of the running call is dropped
    execution.join(member, again=True)
    for _ in range(STEPS):
        stage.runtime.gate.release()
    await eventually(lambda: member.picture is not None)
    assert member.steps == [1, 2, 3, 4, 5]
    assert member.counted == STEPS


async def test_who_comes_back_after_the_end_has_its_picture(stage: Stage) -> None:
    away, other = Member(), Member()
    execution = stage.execution()
    execution.join(away)
    execution.join(other)
    await stage.step(execution, 1)
    execution.leave(away, back=True)
    await stage.step(execution, STEPS)
    await eventually(lambda: other.picture is not None)
    execution.join(away, again=True)
    assert away.picture is other.picture
    assert away.heard[-1] == f"joined {STEPS}"


async def test_what_is_kept_for_nobody_is_given_up(stage: Stage) -> None:
    member = Member()
    execution = stage.execution()
    execution.join(member)
    await stage.step(execution, 1)
    execution.leave(member, back=True)
    execution.give_up()
    assert stage.executions.find("same") is None


async def test_class_and_deadline_are_the_best_of_all_members(stage: Stage) -> None:
    now = asyncio.get_running_loop().time()
    blocker = stage.execution("other", seed=1)
    for n in range(4):
        (blocker if not n else stage.execution(None, seed=n)).join(Member())
    low, high = Member(Priority.BATCH, now + 100), Member(Priority.INTERACTIVE, now + 50)
    execution = stage.execution()
    execution.join(low)
    scheduler = stage.engine.scheduler
    assert scheduler.num_waiting(Priority.BATCH) == 1
    execution.join(high)
    assert scheduler.num_waiting(Priority.INTERACTIVE) == 1
    assert scheduler.next_deadline() == now + 100, "the latest"
    execution.leave(high)
    assert scheduler.num_waiting(Priority.BATCH) == 1
    execution.join(Member(Priority.BATCH, None))
    assert scheduler.next_deadline() is None, "a member has none"


async def test_a_failure_reaches_all_members_and_those_who_come_back(stage: Stage) -> None:
    first, second, away = Member(), Member(), Member()
    execution = stage.execution()
    for member in (first, second, away):
        execution.join(member)
    execution.leave(away, back=True)
    stage.runtime.fail = RuntimeFailure("dead", retryable=True)
    for _ in range(10):
        stage.runtime.gate.release()
    await eventually(lambda: first.error is not None)
    assert isinstance(first.error, UnavailableError)
    assert second.error is first.error
    execution.join(away, again=True)
    assert away.error is first.error


async def test_encodings_are_made_once(stage: Stage) -> None:
    from safelight_server.domain.request import PixelEncoding

    pool = Here()
    picture = FinishedPicture(np.zeros((8, 8, 3), np.uint8), pool)
    one, two = await asyncio.gather(picture.encoded(PixelEncoding()), picture.encoded(PixelEncoding()))
    assert one is two


async def test_who_waits_for_a_preview_of_an_output_that_ends_gets_none(stage: Stage) -> None:
    member = Member()
    execution = stage.execution()
    execution.join(member)
    await stage.step(execution, 1)
    latent = np.zeros(LATENT, np.float32)
    job = execution.job
    asked = asyncio.create_task(stage.engine.preview(job, latent, Component.PREVIEW_DECODER))
    await asyncio.sleep(0)  # it is queued behind the step that the gate blocks
    newer = asyncio.create_task(stage.engine.preview(job, latent, Component.PREVIEW_DECODER))
    async with asyncio.timeout(10):
        assert await asked is None, "the newest wins"
        execution.leave(member)
        assert await newer is None


async def test_what_another_server_develops_is_decoded_here_as_long_as_it_is_followed(stage: Stage) -> None:
    job, latent = stage.execution().job, np.zeros(LATENT, np.float32)
    assert await stage.engine.preview(job, latent, Component.PREVIEW_DECODER) is None, "nobody follows it"
    stage.engine.follow(job.output_id)
    async with asyncio.timeout(10):
        image = await stage.engine.preview(job, latent, Component.PREVIEW_DECODER)
        assert image is not None and image.ndim == 3
        busy = stage.execution("busy")
        busy.join(Member())
        await stage.step(busy, 1)
        late = asyncio.create_task(stage.engine.preview(job, latent, Component.PREVIEW_DECODER))
        await asyncio.sleep(0)  # it is queued behind the step that the gate blocks
        stage.engine.unfollow(job.output_id)
        assert await late is None
    stage.engine.scheduler.check_invariants()


async def test_what_was_developed_is_kept_before_the_end(stage: Stage) -> None:
    class Slow(ExecutionObserver):
        kept = False

        async def keep(self, picture: FinishedPicture, compute_s: float) -> None:
            await asyncio.sleep(0.1)
            self.kept = True

    member, recorder = Member(), Slow()
    execution = stage.execution(recorder=recorder)
    execution.join(member)
    await stage.step(execution, STEPS)
    await eventually(lambda: member.picture is not None)
    await stage.engine.close()
    assert not recorder.kept
    await stage.executions.close()
    assert recorder.kept


async def test_who_leaves_while_it_is_decoded_and_comes_back_has_the_same_picture(stage: Stage) -> None:
    """All steps are made; only the decoding remains."""
    undisturbed, member = Member(), Member()
    for seen, key in ((undisturbed, "before"), (member, "same")):
        execution = stage.execution(key)
        execution.join(seen)
        await stage.step(execution, STEPS - 1)
        stage.runtime.decodes.clear()
        stage.runtime.gate.release()
        await eventually(lambda execution=execution: execution.step == STEPS)
        if seen is member:
            execution.leave(seen, back=True)
            assert stage.engine.scheduler.num_outputs == 0
            execution.join(seen, again=True)
        stage.runtime.decodes.set()
        await eventually(lambda seen=seen: seen.picture is not None)
    assert (member.steps, member.counted) == (undisturbed.steps, STEPS)
    assert np.array_equal(member.picture.pixels, undisturbed.picture.pixels)
    assert stage.executions.find("same") is None
