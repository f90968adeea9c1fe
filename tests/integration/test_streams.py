"""Watchers that stop reading, read slowly or vanish: nobody else is slowed, and their own picture arrives whole."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from tests.conftest import eventually
from tests.integration.test_generate import collect, kinds, reason_of

RAW = pb.PixelEncoding(media_type="application/x-raw-rgba8")
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]


def long_request(steps: int) -> pb.GenerateRequest:
    """Raw previews of 64 KiB after every step."""
    return pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt="x", num_inference_steps=steps),
        preview=pb.PreviewPolicy(accept=[RAW], method=pb.PREVIEW_METHOD_TINY_DECODER),
        encoding=RAW,
    )


@pytest.fixture
async def simulated(start):
    settings = {"runtime": "simulated", "simulated_base_ms": 2.0, "simulated_row_ms": 0.0, "watcher_stall_s": 1.0}
    async with start(**settings) as running:
        yield running


def channel(running):
    """A connection of its own, as another process would have."""
    options = [*SMALL_WINDOW, ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(running.address, options)


def previews(events) -> list[pb.Preview]:
    return [event.preview for event in events if event.WhichOneof("event") == "preview"]


async def test_one_that_stops_reading_is_ended_and_resumes(simulated):
    async with channel(simulated) as connection:
        stub = stubs.GenerationServiceStub(connection)
        message = long_request(1000)
        message.disconnect.action = pb.DisconnectPolicy.ACTION_DETACH
        call = stub.Generate(message)
        first = (await anext(aiter(call))).event
        [generation] = simulated.generations._live.values()
        await eventually(lambda: not generation.log.watchers)
        assert not generation.ended
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "WATCHER_STALLED"
        none = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
        again = pb.WatchGenerationRequest(name=first.generation, after_sequence=first.sequence, preview=none)
        events = await collect(stub.WatchGeneration(again))
        assert kinds(events)[-1] == "finished"
        assert events[-1].finished.usage.num_steps == 1000


async def test_one_that_reads_slowly_gets_newer_previews_and_slows_nobody(simulated):
    async with channel(simulated) as slow_connection, channel(simulated) as quick_connection:
        slow_stub, quick_stub = map(stubs.GenerationServiceStub, (slow_connection, quick_connection))
        slow_events = []

        async def read_slowly() -> None:
            async for response in slow_stub.Generate(long_request(300)):
                slow_events.append(response.event)
                if response.event.WhichOneof("event") == "preview":
                    await asyncio.sleep(0.03)

        reading = asyncio.create_task(read_slowly())
        await eventually(lambda: bool(slow_events))
        name = slow_events[0].generation
        policy = pb.PreviewPolicy(accept=[RAW], method=pb.PREVIEW_METHOD_LINEAR, max_edge_px=8)
        quick = await collect(quick_stub.WatchGeneration(pb.WatchGenerationRequest(name=name, preview=policy)))
        assert kinds(quick)[-1] == "finished"
        await reading
        for events in (quick, slow_events):
            steps = [preview.step for preview in previews(events)]
            assert steps == sorted(set(steps))
            picture = b"".join(e.artifact_chunk.data for e in events if e.WhichOneof("event") == "artifact_chunk")
            assert len(picture) == 128 * 128 * 4
        assert sum(preview.num_dropped for preview in previews(slow_events)) > 10
        assert len(previews(quick)) > len(previews(slow_events))


async def test_one_that_vanishes_leaves_the_others_alone(simulated):
    async with channel(simulated) as connection:
        stub = stubs.GenerationServiceStub(connection)
        gone = channel(simulated)
        call = stubs.GenerationServiceStub(gone).Generate(long_request(200))
        name = (await anext(aiter(call))).event.generation
        watching = asyncio.create_task(collect(stub.WatchGeneration(pb.WatchGenerationRequest(name=name))))
        [generation] = simulated.generations._live.values()
        await eventually(lambda: len(generation.log.watchers) == 2)
        await gone.close()
        await eventually(lambda: len(generation.log.watchers) < 2)
        assert kinds(await watching)[-1] == "finished"


async def test_three_on_one_generation_share_what_is_rendered(simulated):
    async with channel(simulated) as connection:
        stub = stubs.GenerationServiceStub(connection)
        call = stub.Generate(long_request(60))
        name = (await anext(aiter(call))).event.generation
        [generation] = simulated.generations._live.values()
        same = pb.PreviewPolicy(accept=[RAW], method=pb.PREVIEW_METHOD_TINY_DECODER)
        other = pb.PreviewPolicy(accept=[pb.PixelEncoding(media_type="image/webp")], method=pb.PREVIEW_METHOD_LINEAR)
        watches = [pb.WatchGenerationRequest(name=name, preview=policy) for policy in (same, other)]
        first, second, third = await asyncio.gather(
            collect(call), *(collect(stub.WatchGeneration(watch)) for watch in watches)
        )
        for events in (first, second, third):
            assert kinds(events)[-1] == "finished"
        assert {preview.media_type for preview in previews(third)} == {"image/webp"}
        sent = generation.log.num_previews
        assert sent > generation.log.renderer.num_rendered


async def test_without_previews_nothing_is_rendered_or_copied(simulated):
    async with channel(simulated) as connection:
        stub = stubs.GenerationServiceStub(connection)
        message = long_request(30)
        message.preview.CopyFrom(pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE))
        call = stub.Generate(message)
        await anext(aiter(call))
        [generation] = simulated.generations._live.values()
        events = await collect(call)
        assert not previews(events)
        assert generation.log.renderer.num_rendered == 0


async def test_a_picture_resumes_in_the_middle_of_a_chunk(simulated):
    async with channel(simulated) as connection:
        stub = stubs.GenerationServiceStub(connection)
        events = await collect(stub.Generate(long_request(3)))
        name = events[0].generation
        whole = b"".join(e.artifact_chunk.data for e in events if e.WhichOneof("event") == "artifact_chunk")
        offset = pb.ArtifactOffset(output_index=0, offset=1234)
        watch = pb.WatchGenerationRequest(name=name, after_sequence=1, artifact_offsets=[offset])
        rest = [e.artifact_chunk for e in await collect(stub.WatchGeneration(watch)) if e.HasField("artifact_chunk")]
        assert rest[0].offset == 1234
        assert b"".join(chunk.data for chunk in rest) == whole[1234:]
        beyond = pb.WatchGenerationRequest(
            name=name, artifact_offsets=[pb.ArtifactOffset(output_index=0, offset=len(whole) + 1)]
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.WatchGeneration(beyond))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
