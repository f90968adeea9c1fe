"""Memory that is not needed any longer is freed at once, without the garbage collector."""

from __future__ import annotations

import gc

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.domain.picture import FinishedPicture
from safelight_server.generations.execution import Execution
from safelight_server.generations.generation import Generation
from safelight_server.stream import Watcher
from safelight_server.stream.serialization import SerializedArtifact

from tests.conftest import eventually
from tests.integration.test_generate import collect
from tests.integration.test_streams import channel

SIMULATED = {"runtime": "simulated", "simulated_base_ms": 1.0, "simulated_row_ms": 0.0}
MAX_RESULTS = 3


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def num_held(kind: type) -> int:
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


async def develop(stub, seed: int, outputs: int = 1, **how) -> list[pb.GenerationEvent]:
    seeds = [pb.OutputSpec(seed=seed) for _ in range(outputs)]
    spec = pb.GenerationSpec(prompt="x", num_inference_steps=8, outputs=seeds)
    return await collect(stub.Generate(pb.GenerateRequest(spec=spec), **how))


async def test_generations_beyond_the_bound_go_at_once(start, no_collector):
    """Generations that are developed, that have two equal outputs, and that come from the cache."""
    async with start(**SIMULATED, max_results=MAX_RESULTS) as running:
        before = {kind: num_held(kind) for kind in (Generation, Execution, Watcher, FinishedPicture)}
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = stubs.GenerationServiceStub(channel)
            for expected in (pb.CacheResult.DISPOSITION_MISS, pb.CacheResult.DISPOSITION_EXACT):
                for seed in range(2 * MAX_RESULTS):
                    events = await develop(stub, seed, outputs=1 + seed % 2)
                    assert events[-1].finished.cache_results[0].disposition == expected
                await eventually(lambda: num_held(Execution) == before[Execution])  # the pictures are kept
        await eventually(lambda: num_held(Generation) - before[Generation] == MAX_RESULTS)
        await eventually(lambda: all(num_held(kind) == before[kind] for kind in (Execution, Watcher, FinishedPicture)))


async def test_those_whose_deadline_passed_go_at_once(start, no_collector):
    """All outputs of one execution are notified, and end once."""
    async with start(**SIMULATED | {"simulated_base_ms": 50.0}, max_results=1) as running:
        before = num_held(Generation), num_held(Execution)
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = stubs.GenerationServiceStub(channel)
            running.generations._engine.scheduler.estimate_s = lambda *_: 0.0  # so that it is admitted
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await develop(stub, 1, outputs=3, timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await develop(stub, 2)
        await eventually(lambda: num_held(Generation) - before[0] == 1)
        await eventually(lambda: num_held(Execution) == before[1])


async def test_those_whose_streams_end_with_an_error_go_at_once(start, no_collector):
    async with start(**SIMULATED | {"simulated_base_ms": 50.0}, max_results=1) as running:
        before = num_held(Generation)
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = stubs.GenerationServiceStub(channel)
            for seed in range(3):
                call = stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(prompt="x", outputs=[{"seed": seed}])))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for response in call:
                        if response.event.sequence == 1:
                            await stub.CancelGeneration(pb.CancelGenerationRequest(name=response.event.generation))
                assert caught.value.code() is grpc.StatusCode.CANCELLED
            del call, response
        await eventually(lambda: num_held(Generation) - before == 1)


async def test_an_unread_stream_that_was_ended_keeps_no_pictures(start, no_collector):
    """The call lasts as long as its connection, since gRPC cannot end it."""
    raw = pb.PixelEncoding(media_type="application/x-raw-rgba8")
    spec = pb.GenerationSpec(prompt="x", num_inference_steps=1, outputs=[pb.OutputSpec(seed=n) for n in range(16)])
    async with start(**SIMULATED, max_results=1, watcher_stall_s=0.3) as running:
        before = {kind: num_held(kind) for kind in (Generation, SerializedArtifact)}
        async with channel(running) as connection, grpc.aio.insecure_channel(running.address) as healthy:
            calls = []
            for _ in range(4):
                call = stubs.GenerationServiceStub(connection).Generate(pb.GenerateRequest(spec=spec, encoding=raw))
                calls.append(call)
                await call.read()
            await eventually(lambda: len(running.streams) == 4 and not running.inspect().streams)
            await develop(stubs.GenerationServiceStub(healthy), 1)
            await eventually(lambda: all(num_held(kind) - before[kind] == 1 for kind in before))
            assert len(running.streams) == 4, "the calls are still there"
            for call in calls:
                call.cancel()
