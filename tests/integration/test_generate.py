"""Generate from end to end with the real model: a real server, a real client, real pictures."""

from __future__ import annotations

import asyncio
import hashlib
import io
import uuid
from collections.abc import Iterable, Sequence

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from safelight import Client, Finished, Picture, Preview, Progress
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from tests.conftest import eventually, serving_here
from tests.support.pause import steps_paused

PROMPT = "a red potion on a dark background"


BYPASS = pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS)

pytestmark = pytest.mark.asyncio(loop_scope="module")


def request(seed: int = 7, steps: int = 6, **changes: object) -> pb.GenerateRequest:
    """A short generation."""
    outputs = [pb.OutputSpec(seed=seed)]
    spec = pb.GenerationSpec(prompt=PROMPT, outputs=outputs, num_inference_steps=steps)
    message = pb.GenerateRequest(spec=spec, encoding=pb.PixelEncoding(media_type="image/png"))
    for name, value in changes.items():
        getattr(message, name).CopyFrom(value) if hasattr(value, "CopyFrom") else setattr(message, name, value)
    return message


async def collect(call) -> list[pb.GenerationEvent]:
    return [response.event async for response in call]


async def all_at_once(running, stub, messages: Iterable[pb.GenerateRequest]) -> list[list[pb.GenerationEvent]]:
    """The events of generations of which none makes a step before all have been accepted."""
    before = running.inspect().live
    with steps_paused(running):
        calls = [asyncio.create_task(collect(stub.Generate(message))) for message in messages]
        await eventually(lambda: running.inspect().live == before + len(calls))
    return await asyncio.gather(*calls)


async def assert_batched_as_alone(running, stub, messages: Sequence[pb.GenerateRequest]) -> None:
    """Checks that outputs that share batches are different pictures, each with the pixels that it has alone."""
    together = await all_at_once(running, stub, messages)
    assert max(e.progress.batch_size for events in together for e in events if e.HasField("progress")) > 1
    for message, events in zip(messages, together, strict=True):
        assert np.array_equal(pixels(await collect(stub.Generate(message))), pixels(events))
    assert len({pixels(events).tobytes() for events in together}) == len(messages)


def kinds(events: list[pb.GenerationEvent]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


def pixels(events: list[pb.GenerationEvent]) -> np.ndarray:
    data = b"".join(e.artifact_chunk.data for e in events if e.WhichOneof("event") == "artifact_chunk")
    return np.asarray(Image.open(io.BytesIO(data)))


def reason_of(error: grpc.aio.AioRpcError) -> str:
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status_pb2.Status.FromString(details).details)
    return info.reason


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_server():
    async with serving_here() as running, grpc.aio.insecure_channel(running.address) as channel:
        yield running, stubs.GenerationServiceStub(channel)


@pytest_asyncio.fixture(loop_scope="module")
async def server(shared_server):
    """A server shared by tests without settings of their own; each requests pictures that no earlier test has made."""
    yield shared_server
    running, stub = shared_server
    for name in list(running.generations._live):
        await stub.CancelGeneration(pb.CancelGenerationRequest(name=f"generations/{name}"))
    await eventually(lambda: not running.inspect().live)


async def test_a_prompt_alone_is_enough(server):
    _, stub = server
    events = await collect(stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(prompt=PROMPT))))
    assert kinds(events)[0] == "accepted"
    assert kinds(events)[-2:] == ["output_finished", "finished"]
    accepted = events[0].accepted
    assert accepted.spec.num_inference_steps == 20
    assert accepted.spec.outputs[0].HasField("seed")
    assert accepted.numerics_id.startswith("onnxruntime-")
    steps = [event.preview.step for event in events if event.WhichOneof("event") == "preview"]
    assert steps and steps == sorted(set(steps))
    width = accepted.spec.width_px
    assert pixels(events).shape == (width, width, 3)
    usage = events[-1].finished.usage
    assert (usage.num_steps, usage.num_rows) == (20, 40)
    assert usage.num_previews == len(steps)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
async def test_the_last_step_has_no_preview_as_the_picture_follows_it(server, num_steps):
    _, stub = server
    message = request(seed=70, steps=num_steps, cache=BYPASS)
    message.preview.method = pb.PREVIEW_METHOD_LINEAR
    events = await collect(stub.Generate(message))
    assert all(e.preview.step < num_steps for e in events if e.WhichOneof("event") == "preview")
    assert kinds(events)[-3:] == ["artifact_chunk", "output_finished", "finished"]
    finished = events[-1].finished
    assert finished.timings.HasField("first_preview") == (finished.usage.num_previews > 0)


async def test_the_same_spec_gives_the_same_pixels_alone_and_in_any_batch(server):
    running, stub = server
    alone = await collect(stub.Generate(request(seed=7, steps=8, cache=BYPASS)))
    others = [request(seed=100 + n, steps=3 + n, cache=BYPASS) for n in range(6)]
    others[1].spec.guidance_interval.start, others[1].spec.guidance_interval.end = 0.25, 0.75
    others[2].spec.guidance_scale = 1.0
    others[3].spec.sampler.name = "euler_ancestral"
    others[4].spec.sampler.name = "dpmpp_2m"
    others[5].spec.guidance_interval.end, others[5].spec.guidance_rescale = 0.5, 0.7
    crowd = await all_at_once(running, stub, [*others, request(seed=7, steps=8, cache=BYPASS)])
    again = crowd[-1]
    assert max(e.progress.batch_size for e in again if e.WhichOneof("event") == "progress") > 1
    assert np.array_equal(pixels(alone), pixels(again))
    replay = pb.GenerateRequest(spec=alone[0].accepted.spec, cache=BYPASS)
    assert np.array_equal(pixels(alone), pixels(await collect(stub.Generate(replay))))
    for first, message in zip(crowd, others, strict=False):
        assert np.array_equal(pixels(first), pixels(await collect(stub.Generate(message))))


async def test_steps_outside_of_the_guidance_interval_cost_one_row(server):
    _, stub = server

    async def develop(**spec: object) -> list[pb.GenerationEvent]:
        message = request(seed=12, steps=10, cache=BYPASS)
        message.spec.MergeFrom(pb.GenerationSpec(**spec))
        return await collect(stub.Generate(message))

    plain = await develop()
    limited = await develop(guidance_interval=pb.GuidanceInterval(start=0.2, end=0.8))
    whole = await develop(guidance_interval=pb.GuidanceInterval(start=0, end=1), guidance_rescale=0)
    rescaled = await develop(guidance_rescale=0.7)
    usages = [events[-1].finished.usage for events in (plain, limited, whole, rescaled)]
    assert [(u.num_rows, u.num_rows_skipped) for u in usages] == [(20, 0), (16, 4), (20, 0), (20, 0)]
    assert limited[0].accepted.spec.guidance_interval == pb.GuidanceInterval(start=0.2, end=0.8)
    assert not whole[0].accepted.spec.HasField("guidance_interval")
    assert np.array_equal(pixels(plain), pixels(whole))
    assert not np.array_equal(pixels(plain), pixels(limited))
    assert not np.array_equal(pixels(plain), pixels(rescaled))


async def test_several_outputs_come_whole(server):
    _, stub = server
    message = request(seed=6)
    message.spec.outputs.extend([pb.OutputSpec(seed=8), pb.OutputSpec(seed=9)])
    message.encoding.media_type = "application/x-raw-rgba8"
    message.encoding.row_alignment_bytes = 512
    message.encoding.row_order = pb.PixelEncoding.ROW_ORDER_BOTTOM_UP
    events = await collect(stub.Generate(message))
    for index in range(3):
        chunks = [e.artifact_chunk for e in events if e.WhichOneof("event") == "artifact_chunk"]
        mine = [chunk for chunk in chunks if chunk.output_index == index]
        data = b"".join(chunk.data for chunk in mine)
        assert mine[0].stride_bytes % 512 == 0
        assert len(data) == mine[0].total_bytes == mine[0].stride_bytes * mine[0].height_px
        assert mine[-1].sha256 == hashlib.sha256(data).digest()
    alone = await collect(stub.Generate(request(seed=9)))
    rows = np.frombuffer(data, np.uint8).reshape(mine[0].height_px, -1)[::-1, : 4 * mine[0].width_px]
    assert np.array_equal(rows.reshape(mine[0].height_px, -1, 4)[..., :3], pixels(alone))


async def test_cancel_stops_at_a_step_and_ends_the_stream_as_cancelled(server):
    running, stub = server
    call = stub.Generate(request(steps=50))
    events, answer = [], None
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in call:
            events.append(response.event)
            if response.event.progress.step >= 3 and answer is None:
                answer = await stub.CancelGeneration(pb.CancelGenerationRequest(name=response.event.generation))
                assert answer.generation.state == pb.Generation.STATE_CANCELLED
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert events[-1].finished.status.code == grpc.StatusCode.CANCELLED.value[0]
    assert events[-1].finished.usage.num_steps < 50
    assert not running.inspect().live


async def test_a_lost_stream_is_resumed_from_its_step_with_the_same_pixels(server):
    running, stub = server
    message = request(seed=3, steps=30, cache=BYPASS)
    message.spec.guidance_interval.end = 0.5
    undisturbed = pixels(await collect(stub.Generate(message)))
    message.ClearField("cache")
    call = stub.Generate(message)
    name, sequence = "", 0
    async for response in call:
        name, sequence = response.event.generation, max(sequence, response.event.sequence)
        if response.event.progress.step >= 5:
            break
    call.cancel()
    [generation] = running.generations._live.values()
    await eventually(lambda: generation.state.name == "SUSPENDED")
    steps = generation.outputs[0].step
    await asyncio.sleep(0.1)
    assert generation.outputs[0].step == steps < 30
    events = await collect(stub.WatchGeneration(pb.WatchGenerationRequest(name=name, after_sequence=sequence)))
    assert "accepted" not in kinds(events)
    assert np.array_equal(pixels(events), undisturbed)
    assert events[-1].finished.usage.num_steps == 30


async def test_without_a_resume_the_grace_ends_it(server):
    running, stub = server
    message = request(steps=50)
    message.disconnect.resume_grace.FromMilliseconds(50)
    call = stub.Generate(message)
    async for response in call:
        if response.event.progress.step >= 2:
            break
    call.cancel()
    [generation] = running.generations._live.values()
    await eventually(lambda: generation.ended)
    assert generation.state.name == "CANCELLED"
    got = await stub.GetGeneration(pb.GetGenerationRequest(name=generation.name))
    assert 2 <= got.generation.outputs[0].step < 50


async def test_detached_it_runs_to_the_end_and_can_be_watched_again(server):
    running, stub = server
    message = request(steps=12)
    message.disconnect.action = pb.DisconnectPolicy.ACTION_DETACH
    call = stub.Generate(message)
    async for response in call:
        name = response.event.generation
        break
    call.cancel()
    await eventually(lambda: not running.inspect().live)
    events = await collect(stub.WatchGeneration(pb.WatchGenerationRequest(name=name)))
    assert kinds(events) == ["accepted", "artifact_chunk", "output_finished", "finished"]


async def test_a_request_id_never_runs_twice(server):
    _, stub = server
    message = request(seed=5, request_id=str(uuid.uuid4()))
    first, second = await asyncio.gather(collect(stub.Generate(message)), collect(stub.Generate(message)))
    replayed = await collect(stub.Generate(message))
    assert {events[0].generation for events in (first, second, replayed)} == {first[0].generation}
    assert replayed[-1].finished.usage.num_steps == 6
    message.spec.num_inference_steps = 7
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(message))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_what_another_tenant_owns_does_not_exist(start, tmp_path):
    from safelight_server.api.identity import new_key

    (ann, ann_entry), (bob, bob_entry) = new_key("ann", "a"), new_key("bob", "b")
    keys = tmp_path / "keys.json"
    keys.write_text(f'{{"keys": [{ann_entry}, {bob_entry}]}}')
    async with (
        start(api_key_file=keys, runtime="simulated") as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)

        def key(value: str) -> tuple[tuple[str, str], ...]:
            return (("authorization", f"Bearer {value}"),)

        events = await collect(stub.Generate(request(), metadata=key(ann)))
        name = events[0].generation
        for call in (
            lambda: stub.GetGeneration(pb.GetGenerationRequest(name=name), metadata=key(bob)),
            lambda: stub.CancelGeneration(pb.CancelGenerationRequest(name=name), metadata=key(bob)),
            lambda: stub.UpdateGeneration(pb.UpdateGenerationRequest(name=name), metadata=key(bob)),
            lambda: collect(stub.WatchGeneration(pb.WatchGenerationRequest(name=name), metadata=key(bob))),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        for metadata in ((), key("wrong"), (("authorization", ann),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub.Generate(request(), metadata=metadata))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_tenants_do_not_share(start, tmp_path):
    from safelight_server.api.identity import new_key

    (ann, ann_entry), (bob, bob_entry) = new_key("ann", "a"), new_key("bob", "b")
    keys = tmp_path / "keys.json"
    keys.write_text(f'{{"keys": [{ann_entry}, {bob_entry}]}}')
    async with (
        start(api_key_file=keys, runtime="simulated") as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        metadata = [(("authorization", f"Bearer {value}"),) for value in (ann, bob)]
        calls = [asyncio.create_task(collect(stub.Generate(request(steps=50), metadata=who))) for who in metadata]
        await eventually(lambda: running.inspect().live == 2)
        assert running.inspect().outputs == 2
        for events in await asyncio.gather(*calls):
            assert events[-1].finished.cache_results[0].disposition == pb.CacheResult.DISPOSITION_MISS


async def test_a_deadline_that_cannot_be_met_is_refused_before_anything_is_computed(server):
    running, stub = server
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(request(steps=50), timeout=0.02))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not running.inspect().live


async def test_a_full_queue_says_when_to_come_back(start):
    limits = {"runtime": "simulated", "max_running_outputs": 1, "max_waiting_per_caller": 2}
    async with start(**limits) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        message = request()
        message.spec.outputs.extend([pb.OutputSpec(seed=8)])
        with steps_paused(running):
            calls = [asyncio.create_task(collect(stub.Generate(request(seed, steps=50)))) for seed in (1, 2)]
            await eventually(lambda: running.inspect().live == 2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub.Generate(message))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(caught.value) == "QUEUE_FULL"
        for call in calls:
            call.cancel()


async def test_draining_admits_nothing_and_lets_what_runs_finish(start):
    async with start() as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        call = asyncio.create_task(collect(stub.Generate(request(steps=25))))
        await eventually(lambda: bool(running.inspect().live))
        drained = running.drain(20.0)
        await asyncio.sleep(0)
        await eventually(lambda: running.generations._draining)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.Generate(request()))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert kinds(await call)[-1] == "finished"
        await drained


async def test_a_drain_without_grace_says_what_to_send_again(start):
    async with start() as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        call = stub.Generate(request(steps=50))
        async for response in call:
            if response.event.progress.step:
                break
        running.drain(0.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "DRAINING"


async def test_the_client_library_yields_previews_picture_and_end(server):
    running, _ = server
    async with Client(running.address) as client:
        events = [event async for event in client.generate(PROMPT, seed=7, steps=25)]
        assert [type(event) for event in events[-2:]] == [Picture, Finished]
        assert {Progress, Preview} <= {type(event) for event in events}
        picture = events[-2]
        assert picture.seed == 7
        assert Image.open(io.BytesIO(picture.data)).size == (picture.width_px, picture.height_px)
        [model] = await client.models()
        assert model.name == "models/icons"
        assert model.is_default


async def test_updates_reach_a_running_generation(server):
    _, stub = server
    call = stub.Generate(request(seed=4, steps=40))
    events, answer = [], None
    async for response in call:
        events.append(response.event)
        if response.event.progress.step >= 2 and answer is None:
            none = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
            batch = pb.Scheduling(priority=pb.PRIORITY_BATCH)
            name = response.event.generation
            answer = await stub.UpdateGeneration(pb.UpdateGenerationRequest(name=name, preview=none, scheduling=batch))
            assert answer.generation.priority == pb.PRIORITY_BATCH
    steps = [event.preview.step for event in events if event.WhichOneof("event") == "preview"]
    assert max(steps, default=0) < 30


async def test_identical_requests_are_developed_once_and_each_keeps_what_is_its_own(server):
    running, stub = server
    first, second = request(steps=30), request(steps=30)
    second.encoding.media_type = "image/webp"
    calls, streams = [], []
    with steps_paused(running):
        for message in (first, second, request(steps=30)):
            calls.append(stub.Generate(message))
            streams.append(asyncio.create_task(collect(calls[-1])))
            await eventually(lambda: running.inspect().live == len(calls))
        assert running.inspect().outputs == 1
    await eventually(lambda: any(g.outputs[0].step > 2 for g in running.generations._live.values()))
    calls[0].cancel()  # the one that began it
    *_, done, again = await asyncio.gather(*streams, return_exceptions=True)
    for events, media_type in ((done, "image/webp"), (again, "image/png")):
        assert kinds(events)[-1] == "finished"
        [result] = events[-1].finished.cache_results
        assert result.disposition == pb.CacheResult.DISPOSITION_COALESCED
        chunks = [e.artifact_chunk for e in events if e.WhichOneof("event") == "artifact_chunk"]
        assert {chunk.media_type for chunk in chunks} == {media_type}
    undisturbed = await collect(stub.Generate(request(steps=30, cache=BYPASS)))
    assert np.array_equal(pixels(again), pixels(undisturbed))
    assert undisturbed[-1].finished.cache_results[0].disposition == pb.CacheResult.DISPOSITION_MISS
    counted = done[-1].finished.usage.num_steps + again[-1].finished.usage.num_steps
    assert 0 < counted < 30, "the steps before the cancel count for the one that left; none counts twice"


async def test_bypass_neither_joins_nor_is_joined(server):
    running, stub = server
    alone = request(steps=20, cache=BYPASS)
    with steps_paused(running):
        calls = [asyncio.create_task(collect(stub.Generate(r))) for r in (alone, request(steps=20), alone)]
        await eventually(lambda: running.inspect().live == 3)
        assert running.inspect().outputs == 3
    results = await asyncio.gather(*calls)
    assert all(np.array_equal(pixels(results[0]), pixels(other)) for other in results[1:])


async def test_a_shared_generation_that_is_lost_comes_back_to_what_others_have_made(server):
    running, stub = server
    with steps_paused(running):
        call, other = stub.Generate(request(steps=40)), asyncio.create_task(collect(stub.Generate(request(steps=40))))
        name = (await anext(aiter(call))).event.generation
        await eventually(lambda: running.inspect().live == 2)
        call.cancel()
        lost = running.generations._live[name.partition("/")[2]]
        await eventually(lambda: lost.state.name == "SUSPENDED")
    step = lost.outputs[0].step
    await eventually(lambda: max(g.outputs[0].step for g in running.generations._live.values()) > step + 3)
    events = await collect(stub.WatchGeneration(pb.WatchGenerationRequest(name=name)))
    assert np.array_equal(pixels(events), pixels(await other))
