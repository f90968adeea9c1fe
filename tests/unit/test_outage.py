"""Lost instances and outages, in the real engine on a runtime that the test takes down."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
from safelight_server.domain.component import Component
from safelight_server.domain.errors import InternalError, UnavailableError
from safelight_server.engine.engine import Engine
from safelight_server.engine.jobs import Job
from safelight_server.engine.latents import Latents
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.runtime.base import FaultOrigin, RuntimeFailure
from safelight_server.runtime.simulated import LATENT, SimulatedRuntime, simulated_pipeline
from safelight_server.sampler import SamplerSpec, compile_table
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Metrics

from tests.conftest import eventually
from tests.support.streams import Clock

STEPS = 6


class Flaky(SimulatedRuntime):
    """Two instances that the test takes down; a call on one that goes down is lost."""

    def __init__(self) -> None:
        super().__init__(2, 0.0, 0.0)
        self.live = {0, 1}
        self.lose_next = 0
        self.fault = FaultOrigin.INSTANCE
        self.steps: Counter[float] = Counter()
        self.changed = lambda: None

    @property
    def num_live(self):
        return len(self.live)

    def usable(self, free):
        return sorted(self.live & set(free))

    def watch(self, changed):
        self.changed = changed

    def set_live(self, *live: int) -> None:
        self.live = set(live)
        self.changed()

    async def run(self, instance, model, component, inputs):
        results = await super().run(instance, model, component, inputs)
        if component is Component.DENOISER:
            if self.lose_next or instance not in self.live:
                self.lose_next -= 1
                raise RuntimeFailure("lost", retryable=True, fault=self.fault)
            self.steps.update(inputs["timestep"].tolist())
        return {name: np.array(rows) for name, rows in results.items()}


class Listener(ExecutionObserver):
    """Records its reports."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows = 0
        self.end: object = None

    def computed(self, seconds, rows):
        self.rows += rows

    def stepped(self, step, batch_size):
        self.steps.append(step)

    def decoded(self, image):
        self.end = "decoded"

    def failed(self, error):
        self.end = error

    def expired(self):
        self.end = "expired"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def stage(clock):
    runtime = Flaky()
    engine = Engine(runtime, clock, Metrics(), max_running=8, runtime_wait_s=10.0, runtime_grace_s=2.0)
    yield engine, runtime
    runtime.set_live(0, 1)
    runtime.lose_next = 0
    await engine.close()


def submit(engine: Engine, output_id: int = 1, deadline: float | None = None) -> Listener:
    pipeline = simulated_pipeline()
    table = compile_table(SamplerSpec("ddim", "trailing"), pipeline.schedule, "v_prediction", STEPS)
    job = Job(output_id, "me", Priority.STANDARD, pipeline, LATENT, table, 1, 1.0, ((0,) * 16,), deadline)
    listener = Listener()
    engine.submit(job, listener)
    return listener


@pytest.mark.parametrize(("fault", "losses"), [(FaultOrigin.INSTANCE, 10), (FaultOrigin.NOBODY, 40)])
async def test_lost_instances_cost_no_attempts_and_no_step_counts_twice(stage, fault, losses):
    engine, runtime = stage
    runtime.lose_next, runtime.fault = losses, fault
    listener = submit(engine)
    await eventually(lambda: listener.end is not None)
    assert listener.end == "decoded"
    assert listener.steps == list(range(1, STEPS + 1))
    assert listener.rows == STEPS
    assert set(runtime.steps.values()) == {1}


async def test_an_output_under_which_every_instance_is_lost_ends(stage):
    engine, runtime = stage
    runtime.lose_next = 1000
    listener = submit(engine)
    await eventually(lambda: listener.end is not None)
    assert isinstance(listener.end, UnavailableError)
    assert listener.end.reason == "RUNTIME_FAILED"


async def test_without_an_instance_outputs_wait_and_go_on_when_one_comes(stage, clock):
    engine, runtime = stage
    runtime.set_live()
    listener = submit(engine)
    clock.now = 9.0
    await asyncio.sleep(0)
    assert not listener.steps
    runtime.set_live(1)
    await eventually(lambda: listener.end is not None)
    assert listener.end == "decoded"


async def test_one_without_a_deadline_waits_so_long_and_one_with_it_until_then(stage, clock):
    engine, runtime = stage
    runtime.set_live()
    patient, bounded = submit(engine, 1), submit(engine, 2, deadline=30.0)
    clock.now = 10.0
    engine.outage._ring()  # as its timer does
    await eventually(lambda: patient.end is not None)
    assert patient.end.reason == "RUNTIME_UNAVAILABLE"
    assert bounded.end is None
    clock.now = 30.0
    engine._pump()
    await eventually(lambda: bounded.end is not None)
    assert bounded.end.reason == "RUNTIME_UNAVAILABLE"


async def test_whoever_asks_for_an_embedding_waits_no_longer_either(stage, clock):
    engine, runtime = stage
    runtime.set_live()
    asked = asyncio.create_task(engine.encode(simulated_pipeline(), (1,) * 16))
    await asyncio.sleep(0)
    clock.now = 10.0
    engine.outage._ring()
    with pytest.raises(UnavailableError) as caught:
        await asked
    assert caught.value.reason == "RUNTIME_UNAVAILABLE"
    runtime.set_live(0)
    await eventually(lambda: not engine._embedding_waiters)
    assert (await engine.encode(simulated_pipeline(), (1,) * 16)).keys() == {"last_hidden_state"}


@pytest.mark.parametrize("broken", [TypeError("a bug"), {"nothing": np.zeros(1)}], ids=["raises", "answers nonsense"])
async def test_a_bug_in_a_call_ends_its_outputs_and_nothing_else(stage, broken):
    engine, runtime = stage
    run = runtime.run

    async def run_broken(*given):
        runtime.run = run
        if isinstance(broken, dict):
            return broken
        raise broken

    first = submit(engine)
    runtime.run = run_broken
    await eventually(lambda: first.end is not None)
    assert isinstance(first.end, InternalError)
    others = [submit(engine, output_id) for output_id in range(2, 10)]
    await eventually(lambda: all(other.end == "decoded" for other in others))
    assert not engine._busy
    engine.scheduler.check_invariants()
    assert engine.scheduler.num_outputs == 0


@pytest.mark.parametrize("where", ["claim", "rows"])
async def test_without_memory_for_a_batch_its_outputs_end_and_nothing_else(stage, monkeypatch, where):
    engine, _ = stage

    def without_memory(*_):
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(Latents, where, without_memory)
    first = submit(engine)
    await eventually(lambda: first.end is not None)
    assert isinstance(first.end, InternalError)
    others = [submit(engine, output_id) for output_id in range(2, 10)]
    await eventually(lambda: all(other.end == "decoded" for other in others))
    assert not engine._busy
    assert not engine._batches._departed
    assert all(len(latents._free) == latents._x.shape[0] for latents in engine._batches._latents.values())
    engine.scheduler.check_invariants()


async def test_an_embedding_that_is_asked_for_while_its_last_output_ends_is_encoded_anew(stage):
    engine, runtime = stage
    runtime.set_live()
    submit(engine)
    asked = asyncio.create_task(engine.encode(simulated_pipeline(), (0,) * 16))
    await asyncio.sleep(0)  # its request is handled in the next turn
    engine.cancel(1)
    runtime.set_live(0)
    assert (await asked).keys() == {"last_hidden_state"}
    assert not engine._batches.encoder_inputs


async def test_a_deadline_that_passes_while_instances_are_there_is_a_deadline(stage, clock):
    engine, _ = stage
    listener = submit(engine, deadline=0.0)
    await eventually(lambda: listener.end is not None)
    assert listener.end == "expired"


async def test_new_work_is_taken_within_the_grace_only(stage, clock):
    engine, runtime = stage
    runtime.set_live()
    clock.now = 1.9
    engine.outage.check()
    clock.now = 2.0
    assert engine.outage.beyond_grace
    with pytest.raises(UnavailableError):
        engine.outage.check()
    with pytest.raises(UnavailableError):
        await engine.encode(simulated_pipeline(), (1,) * 16)
    assert not engine._embedding_waiters
    runtime.set_live(0)
    engine.outage.check()
