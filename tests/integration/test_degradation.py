"""Under pressure the quality of a request is lowered as its floor allows, and the accepted spec is developed."""

from __future__ import annotations

import itertools

import grpc
import numpy as np
import pytest
import pytest_asyncio
from safelight import Client, Finished, QualityFloor
from safelight import Degradation as GivenUp
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.runtime.base import CostCurve
from safelight_server.scheduler import Priority

from tests.conftest import eventually, serving_here
from tests.integration.test_generate import BYPASS, collect, pixels, request

STEPS, FLOOR = 10, 4
FEWER = pb.QualityFloor(min_num_steps=FLOOR)
FEWER_STEPS = pb.Degradation(kind=pb.Degradation.KIND_FEWER_STEPS, requested="10", applied="4")
pytestmark = pytest.mark.asyncio(loop_scope="module")


class AlwaysOn:
    """Pressure on every class."""

    def update(self, left_s: object, num_instances: int) -> None:
        """Does nothing, so that the pressure never ends."""

    def on(self, priority: Priority) -> bool:
        return True


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server():
    """A server shared by tests that set the pressure; each test uses its own seeds."""
    async with serving_here() as running, grpc.aio.insecure_channel(running.address) as channel:
        yield running, stubs.GenerationServiceStub(channel)


@pytest.fixture
def pressed(server, monkeypatch):
    monkeypatch.setattr(server[0].generations, "_pressure", AlwaysOn())


@pytest.fixture
def seed(_seeds=itertools.count(50_000, 10)):
    return next(_seeds)


def sample(running, name: str, **labels: str) -> float:
    return running.generations._metrics.registry.get_sample_value(name, labels)


async def kept(running) -> None:
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))


@pytest.mark.parametrize("priority", [pb.PRIORITY_STANDARD, pb.PRIORITY_BATCH])
async def test_fewer_steps_are_accepted_developed_told_and_counted(server, pressed, seed, priority):
    running, stub = server
    name = pb.Priority.Name(priority).removeprefix("PRIORITY_").lower()
    counted = {"kind": "fewer_steps", "class": name}
    before = sample(running, "safelight_degradations_total", **counted)
    asked = request(seed, STEPS, quality_floor=FEWER, cache=BYPASS, scheduling=pb.Scheduling(priority=priority))
    events = await collect(stub.Generate(asked))
    assert events[0].accepted.spec.num_inference_steps == FLOOR
    assert events[-1].finished.usage.num_steps == FLOOR
    assert list(events[-1].finished.degradations) == [FEWER_STEPS]
    got = (await stub.GetGeneration(pb.GetGenerationRequest(name=events[0].generation))).generation
    assert list(got.degradations) == [FEWER_STEPS]
    assert got.spec == events[0].accepted.spec
    assert np.array_equal(pixels(events), pixels(await collect(stub.Generate(request(seed, FLOOR, cache=BYPASS)))))
    assert sample(running, "safelight_degradations_total", **counted) == before + 1


async def test_nothing_happens_without_a_floor_or_without_pressure(server, seed, monkeypatch):
    running, stub = server
    events = await collect(stub.Generate(request(seed, STEPS, quality_floor=FEWER)))
    monkeypatch.setattr(running.generations, "_pressure", AlwaysOn())
    events += await collect(stub.Generate(request(seed + 1, STEPS)))
    for event in events:
        if event.HasField("accepted"):
            assert event.accepted.spec.num_inference_steps == STEPS
        if event.HasField("finished"):
            assert not event.finished.degradations


async def test_a_picture_that_is_there_keeps_its_quality(server, pressed, seed):
    running, stub = server
    first = await collect(stub.Generate(request(seed, STEPS)))
    await kept(running)
    again = await collect(stub.Generate(request(seed, STEPS, quality_floor=FEWER)))
    assert again[-1].finished.cache_results[0].disposition == pb.CacheResult.DISPOSITION_EXACT
    assert not again[-1].finished.degradations
    assert np.array_equal(pixels(first), pixels(again))


async def test_equal_requests_share_what_is_developed_for_less(server, pressed, seed):
    running, stub = server
    await collect(stub.Generate(request(seed, STEPS, quality_floor=FEWER)))
    await kept(running)
    again = await collect(stub.Generate(request(seed, STEPS, quality_floor=FEWER)))
    assert again[-1].finished.cache_results[0].disposition == pb.CacheResult.DISPOSITION_EXACT
    assert list(again[-1].finished.degradations) == [FEWER_STEPS]


async def test_a_similar_picture_is_served_and_no_latent_is_begun_from(server, pressed, seed):
    running, stub = server
    first = request(seed, STEPS)
    first.spec.prompt = "a golden key on a blue background"
    source = await collect(stub.Generate(first))
    await kept(running)
    near = request(seed + 1, STEPS, quality_floor=pb.QualityFloor(min_similarity=0.8))
    near.spec.prompt = "golden key, blue background"
    events = await collect(stub.Generate(near))
    [result], [told] = events[-1].finished.cache_results, events[-1].finished.degradations
    assert result.disposition == pb.CacheResult.DISPOSITION_SIMILAR
    assert (told.kind, told.requested) == (pb.Degradation.KIND_SIMILAR_PICTURE, "1")
    assert float(told.applied) == pytest.approx(result.similarity, abs=1e-5)
    assert np.array_equal(pixels(source), pixels(events))
    far = request(seed + 2, STEPS, quality_floor=pb.QualityFloor(min_similarity=0.9999))
    far.spec.prompt = "golden key, blue background"
    events = await collect(stub.Generate(far))
    assert events[-1].finished.cache_results[0].disposition == pb.CacheResult.DISPOSITION_MISS
    assert not events[-1].finished.degradations


async def test_previews_of_all_streams_become_linear(server, pressed, seed):
    _, stub = server
    tiny = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_TINY_DECODER)
    asked = request(seed, 50, quality_floor=pb.QualityFloor(cheaper_previews=True), preview=tiny, cache=BYPASS)
    responses = aiter(stub.Generate(asked))
    first = (await anext(responses)).event
    screen = stub.WatchGeneration(pb.WatchGenerationRequest(name=first.generation, preview=tiny))
    events, seen = await collect(responses), await collect(screen)
    methods = {e.preview.method for e in [*events, *seen] if e.HasField("preview")}
    assert methods == {pb.PREVIEW_METHOD_LINEAR}
    [told] = events[-1].finished.degradations
    assert (told.kind, told.requested, told.applied) == (
        pb.Degradation.KIND_CHEAPER_PREVIEWS,
        "PREVIEW_METHOD_TINY_DECODER",
        "PREVIEW_METHOD_LINEAR",
    )


async def test_the_python_client_asks_for_it_and_is_told(server, pressed, seed):
    running, _ = server
    async with Client(running.address) as client:
        floor = QualityFloor(min_num_steps=FLOOR)
        events = [e async for e in client.generate("a red potion", seed=seed, steps=STEPS, quality_floor=floor)]
    assert isinstance(events[-1], Finished)
    assert events[-1].degradations == (GivenUp("fewer_steps", "10", "4"),)


async def test_demand_is_what_was_asked_for(server, seed, monkeypatch):
    """A fleet that lowers quality is too small, so the scaler must see the load without degradation."""
    running, stub = server
    monkeypatch.setattr(CostCurve, "at", lambda _, rows: 0.01 + 0.001 * rows)  # a measured one changes with each call
    asked: list[float] = []
    for pressed in (False, True):
        if pressed:
            monkeypatch.setattr(running.generations, "_pressure", AlwaysOn())
        before = sample(running, "safelight_requested_compute_seconds_total", **{"class": "standard"})
        events = await collect(stub.Generate(request(seed, STEPS, quality_floor=FEWER, cache=BYPASS)))
        assert events[0].accepted.spec.num_inference_steps == (FLOOR if pressed else STEPS)
        asked.append(sample(running, "safelight_requested_compute_seconds_total", **{"class": "standard"}) - before)
    assert asked[0] == pytest.approx(asked[1]) and asked[0] > 0


async def test_a_queue_makes_pressure_and_its_end_ends_it():
    slow = {"runtime": "simulated", "simulated_base_ms": 20, "num_instances": 1, "max_running_outputs": 1}
    async with (
        serving_here(class_wait_s={"standard": 1.0}, **slow) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        long = stub.Generate(request(1, 1000))
        await long.read()
        waiting = [stub.Generate(request(seed, 1000)) for seed in range(2, 6)]
        for call in waiting:
            await call.read()
        await eventually(lambda: running.generations.under_pressure(Priority.STANDARD))
        assert not running.generations.under_pressure(Priority.INTERACTIVE)
        assert sample(running, "safelight_class_late", **{"class": "standard"}) == 1
        degraded = stub.Generate(request(9, 1000, quality_floor=pb.QualityFloor(min_num_steps=2)))
        assert (await degraded.read()).event.accepted.spec.num_inference_steps == 2
        for call in (long, *waiting, degraded):
            call.cancel()
        await eventually(lambda: not running.generations.under_pressure(Priority.STANDARD))
        assert sample(running, "safelight_class_late", **{"class": "standard"}) == 0
