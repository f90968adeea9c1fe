"""An interactive request is served soon whatever others have queued, and outputs whose slot it takes lose nothing."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from tests.conftest import eventually

INTERACTIVE = pb.Scheduling(priority=pb.PRIORITY_INTERACTIVE)
BATCH = pb.Scheduling(priority=pb.PRIORITY_BATCH)


def request(steps: int, seeds: list[int], scheduling: pb.Scheduling, **spec: object) -> pb.GenerateRequest:
    """A request for raw pixels without previews, which bypasses the caches."""
    outputs = [pb.OutputSpec(seed=seed) for seed in seeds]
    return pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt="a red potion", num_inference_steps=steps, outputs=outputs, **spec),
        preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE),
        encoding=pb.PixelEncoding(media_type="application/x-raw-rgba8"),
        cache=pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS),
        scheduling=scheduling,
    )


async def pictures(call) -> dict[int, bytes]:
    """The pixels of each output."""
    found: dict[int, bytes] = {}
    async for response in call:
        if response.event.WhichOneof("event") == "artifact_chunk":
            chunk = response.event.artifact_chunk
            found[chunk.output_index] = found.get(chunk.output_index, b"") + chunk.data
    return found


async def test_whose_slot_is_taken_goes_on_with_the_same_pixels(start):
    async with (
        start(max_running_outputs=4, num_instances=1) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        long = request(50, [1, 2, 3, 4], BATCH)
        alone = await pictures(stub.Generate(long))
        scheduler = running.generations._engine.scheduler
        beside = asyncio.create_task(pictures(stub.Generate(long)))
        await eventually(lambda: scheduler.num_running == 4)
        for seed in (11, 12, 13):
            parked = eventually(lambda: scheduler.num_parked == 1)
            quick = asyncio.create_task(pictures(stub.Generate(request(6, [seed], INTERACTIVE))))
            await parked
            await quick
            assert not beside.done()
        assert await beside == alone
        assert scheduler.num_parked == 0


async def test_a_parked_output_can_be_cancelled(start):
    settings = {"runtime": "simulated", "max_running_outputs": 3, "num_instances": 1, "simulated_base_ms": 5.0}
    async with start(**settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        scheduler = running.generations._engine.scheduler
        hog = stub.Generate(request(900, [1, 2, 3], BATCH))
        await hog.read()
        await eventually(lambda: scheduler.num_running == 3)
        mine = stub.Generate(request(900, [1, 2, 3], INTERACTIVE))
        await mine.read()
        await eventually(lambda: scheduler.num_parked == 2)
        hog.cancel()
        mine.cancel()
        await eventually(lambda: scheduler.num_running + scheduler.num_waiting() > 0)
        for generation in list(running.generations._live.values()):
            await running.generations.cancel(generation)
        await eventually(lambda: scheduler.num_outputs == scheduler.num_parked == 0)
        scheduler.check_invariants()


async def test_what_one_request_may_cost_is_bounded(start):
    async with (
        start(runtime="simulated", max_request_rows=100) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pictures(stub.Generate(request(26, [1, 2], BATCH, guidance_scale=3.0)))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "costs 104 denoiser rows with guidance; at most 100" in (refused.value.details() or "")
        await pictures(stub.Generate(request(25, [1, 2], BATCH, guidance_scale=3.0)))
