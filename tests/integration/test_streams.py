"""Watchers that stop reading, read slowly or vanish: no other is slowed, and their own picture arrives complete."""

from __future__ import annotations

import asyncio
import gc

import grpc
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from structlog.testing import capture_logs

from tests.conftest import eventually
from tests.integration.test_generate import collect, kinds, reason_of
from tests.support.relay import Relay

RAW = pb.PixelEncoding(media_type="application/x-raw-rgba8")
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
PICTURE_BYTES = 128 * 128 * 4


def long_request(steps: int) -> pb.GenerateRequest:
    """A request with raw previews of 64 KiB after every step."""
    return pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt="x", num_inference_steps=steps),
        preview=pb.PreviewPolicy(accept=[RAW], method=pb.PREVIEW_METHOD_TINY_DECODER),
        encoding=RAW,
    )


@pytest.fixture
async def simulated(start):
    settings = {"runtime": "simulated", "simulated_base_ms": 3.0, "simulated_row_ms": 0.0, "watcher_stall_s": 1.0}
    async with start(**settings) as running:
        yield running


def channel(running):
    """A separate connection, as from another process."""
    options = [*SMALL_WINDOW, ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(running.address, options)


def streams_of_server() -> int:
    """Number of streaming calls that the server, which runs in this process, has not released."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return sum(name in ("_schedule_rpc_coro", "_Stream._abort") for name in names)


def whole(events) -> bytes:
    return b"".join(e.artifact_chunk.data for e in events if e.WhichOneof("event") == "artifact_chunk")


def previews(events) -> list[pb.Preview]:
    return [event.preview for event in events if event.WhichOneof("event") == "preview"]


async def test_one_that_stops_reading_is_ended_and_resumes(simulated):
    """Another watcher gets everything meanwhile, and the steps continue."""
    async with channel(simulated) as connection, channel(simulated) as healthy_connection:
        stub, healthy_stub = map(stubs.GenerationServiceStub, (connection, healthy_connection))
        message = long_request(1000)
        message.disconnect.action = pb.DisconnectPolicy.ACTION_DETACH
        call = stub.Generate(message)
        first = (await anext(aiter(call))).event
        [generation] = simulated.generations._live.values()
        [stalled] = generation.log.watchers
        policy = pb.PreviewPolicy(accept=[RAW], method=pb.PREVIEW_METHOD_LINEAR)
        healthy = asyncio.create_task(
            collect(healthy_stub.WatchGeneration(pb.WatchGenerationRequest(name=first.generation, preview=policy)))
        )
        with capture_logs() as lines:
            await eventually(lambda: stalled not in generation.log.watchers)
        [line] = [line for line in lines if line["event"] == "stream_ended"]
        assert (line["reason"], line["generation"]) == ("WATCHER_STALLED", generation.name)
        assert line["client"].startswith("ipv4:127.0.0.1:")
        assert line["waiting_bytes"] > 0, "a preview that was not taken"
        step = generation.outputs[0].step
        await eventually(lambda: generation.outputs[0].step > step + 10)
        assert not generation.ended
        events = await healthy
        assert kinds(events)[-1] == "finished"
        assert len(whole(events)) == PICTURE_BYTES
        assert len(previews(events)) > 20
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "WATCHER_STALLED"
        none = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
        again = pb.WatchGenerationRequest(name=first.generation, after_sequence=first.sequence, preview=none)
        events = await collect(stub.WatchGeneration(again))
        assert kinds(events)[-1] == "finished"
        assert len(whole(events)) == PICTURE_BYTES
        assert events[-1].finished.usage.num_steps == 1000


async def test_those_that_are_ended_from_outside_do_not_end_well(simulated):
    """Their status is an error even if they return at once: here they wait for events when the watcher is closed."""
    async with channel(simulated) as connection:
        stub = stubs.GenerationServiceStub(connection)
        message = long_request(1000)
        message.disconnect.action = pb.DisconnectPolicy.ACTION_DETACH
        name = (await anext(aiter(stub.Generate(message)))).event.generation
        none = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
        reading = []
        for _ in range(8):
            call = stub.WatchGeneration(pb.WatchGenerationRequest(name=name, preview=none))
            await anext(aiter(call))
            reading.append(asyncio.create_task(collect(call)))
        [generation] = simulated.generations._live.values()
        simulated.generations._streams.move(generation)
        for outcome in await asyncio.gather(*reading, return_exceptions=True):
            assert isinstance(outcome, grpc.aio.AioRpcError), "it ended as if all had been said"
            assert outcome.code() is grpc.StatusCode.UNAVAILABLE
            assert reason_of(outcome) == "MOVED"


async def test_a_stalled_one_whose_connection_dies_is_forgotten(simulated, capfd):
    """Its status cannot be sent any more; it is dropped, and nothing of the stream is left."""
    relay = await Relay.start(simulated.address)
    async with grpc.aio.insecure_channel(relay.address, SMALL_WINDOW) as connection:
        call = stubs.GenerationServiceStub(connection).Generate(long_request(1000))
        await anext(aiter(call))
        [generation] = simulated.generations._live.values()
        await eventually(lambda: not generation.log.watchers)
        assert streams_of_server()
        relay.cut()
        await eventually(lambda: not streams_of_server())
    gc.collect()
    assert "never retrieved" not in "".join(capfd.readouterr())


async def test_one_that_reads_slowly_gets_newer_previews_and_slows_nobody(simulated):
    async with channel(simulated) as slow_connection, channel(simulated) as quick_connection:
        slow_stub, quick_stub = map(stubs.GenerationServiceStub, (slow_connection, quick_connection))
        slow_events = []

        async def read_slowly() -> None:
            async for response in slow_stub.Generate(long_request(300)):
                slow_events.append(response.event)
                if response.event.WhichOneof("event") == "preview":
                    await asyncio.sleep(0.1)

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
            assert len(whole(events)) == PICTURE_BYTES
        assert sum(preview.num_dropped for preview in previews(slow_events)) > 10
        assert len(previews(quick)) > len(previews(slow_events))


async def test_one_that_vanishes_leaves_the_others_alone(simulated):
    relay = await Relay.start(simulated.address)
    async with channel(simulated) as connection, grpc.aio.insecure_channel(relay.address, SMALL_WINDOW) as gone:
        stub = stubs.GenerationServiceStub(connection)
        call = stubs.GenerationServiceStub(gone).Generate(long_request(200))
        name = (await anext(aiter(call))).event.generation
        watching = asyncio.create_task(collect(stub.WatchGeneration(pb.WatchGenerationRequest(name=name))))
        [generation] = simulated.generations._live.values()
        await eventually(lambda: len(generation.log.watchers) == 2)
        relay.cut()
        await eventually(lambda: len(generation.log.watchers) < 2)
        events = await watching
        assert kinds(events)[-1] == "finished"
        assert len(whole(events)) == PICTURE_BYTES


async def test_three_on_one_generation_share_what_is_rendered(simulated):
    """With two watchers of the same encoding and one of another, a step is decoded once and encoded twice."""
    steps = 300
    async with channel(simulated) as connection:
        stub = stubs.GenerationServiceStub(connection)
        call = stub.Generate(long_request(steps))
        name = (await anext(aiter(call))).event.generation
        [generation] = simulated.generations._live.values()
        feed = generation.outputs[0]._execution.feed
        same = pb.PreviewPolicy(accept=[RAW], method=pb.PREVIEW_METHOD_TINY_DECODER)
        other = pb.PreviewPolicy(
            accept=[pb.PixelEncoding(media_type="image/webp")], method=pb.PREVIEW_METHOD_TINY_DECODER
        )
        watches = [pb.WatchGenerationRequest(name=name, preview=policy) for policy in (same, other)]
        streams = await asyncio.gather(collect(call), *(collect(stub.WatchGeneration(watch)) for watch in watches))
    for events in streams:
        assert kinds(events)[-1] == "finished"
    assert {preview.media_type for preview in previews(streams[2])} == {"image/webp"}
    sent = [(preview.step, preview.media_type) for events in streams for preview in previews(events)]
    assert all(len(previews(events)) > 2 for events in streams), "neither encoding takes the other's place"
    overtaken = feed.num_rendered - len(set(sent))
    assert 0 <= overtaken <= 2, "only what the picture overtook was rendered and not sent"
    assert generation.log.num_previews == len(sent) > len(set(sent))


async def test_without_previews_nothing_is_rendered_or_copied(simulated):
    async with channel(simulated) as connection:
        stub = stubs.GenerationServiceStub(connection)
        message = long_request(30)
        message.preview.CopyFrom(pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE))
        call = stub.Generate(message)
        await anext(aiter(call))
        [generation] = simulated.generations._live.values()
        feed = generation.outputs[0]._execution.feed
        events = await collect(call)
        assert not previews(events)
        assert feed.num_rendered == 0


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
