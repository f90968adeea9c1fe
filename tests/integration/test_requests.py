"""Refused requests over gRPC: complete reasons, no computation, and only bounded memory."""

from __future__ import annotations

import asyncio
import gc
import uuid
from unittest.mock import Mock

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safelight.servers import CHANNEL_OPTIONS
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import models_pb2, models_pb2_grpc
from safelight_server.domain.picture import EncodedPicture
from safelight_server.runtime.base import RuntimeFailure

from tests.conftest import eventually
from tests.support.pause import steps_paused
from tests.support.relay import Relay

GENERATE = "/safelight.v1.GenerationService/Generate"
SIMULATED = {"runtime": "simulated", "num_instances": 1, "simulated_base_ms": 5.0, "simulated_row_ms": 0.0}


def request(**spec: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(spec=pb.GenerationSpec(**{"prompt": "a red potion", "num_inference_steps": 4, **spec}))


@pytest.fixture
async def server(start):
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        yield running, channel


async def refusal(call) -> tuple[grpc.StatusCode, dict[str, Message]]:
    """The status of a failed call, and its details by name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code(), details(caught.value)


def details(error: grpc.aio.AioRpcError) -> dict[str, Message]:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = {}
    for detail in status.details:
        name = detail.type_url.rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(found[name])
    return found


def fields(found: dict[str, Message]) -> list[str]:
    return [violation.field for violation in found["BadRequest"].field_violations]


def nothing_ran(running) -> bool:
    held = running.inspect()
    return not (held.live or held.finished or held.outputs)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x12\x04\x12\x02\xff\xfe", id="a prompt that is not UTF-8"),
        pytest.param(b"\x0a\x02\xc3\x28", id="a request id that is not UTF-8"),
        pytest.param(b"\x12\x7fab", id="cut short"),
        pytest.param(b"\xff" * 64, id="no protobuf at all"),
    ],
)
async def test_what_protobuf_cannot_parse_is_an_invalid_argument(server, data):
    running, channel = server
    code, found = await refusal(channel.unary_stream(GENERATE)(data))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(found) == ["request"]
    assert found["ErrorInfo"].reason == "INVALID_REQUEST"
    assert nothing_ran(running)


async def test_no_bytes_at_all_lack_a_prompt(server):
    _, channel = server
    code, found = await refusal(channel.unary_stream(GENERATE)(b""))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(found) == ["spec.prompt"]


async def test_bad_fields_are_named_on_the_wire_and_reach_no_engine(server):
    running, channel = server
    message = request(prompt="a\0b", num_inference_steps=0, guidance_scale=float("nan"), width_px=3)
    message.preview.method = 77
    message.encoding.media_type = "image/gif"
    code, found = await refusal(stubs.GenerationServiceStub(channel).Generate(message))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(found) == [
        "spec.prompt",
        "spec.num_inference_steps",
        "spec.guidance_scale",
        "spec.width_px",
        "preview.method",
        "encoding.media_type",
    ]
    assert nothing_ran(running)


async def test_the_worst_request_still_gets_its_whole_answer(server):
    _, channel = server
    message = request(num_inference_steps=-1)
    message.request_id = "\U0001f600" * 1000
    message.labels.update({"\U0001f600" * 64 + str(index): "v" * 256 for index in range(16)})
    code, found = await refusal(stubs.GenerationServiceStub(channel).Generate(message))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(fields(found)) == 16


async def test_an_unknown_model_is_not_found_by_name(server):
    _, channel = server
    code, found = await refusal(stubs.GenerationServiceStub(channel).Generate(request(model="models/nope")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert fields(found) == ["spec.model"]
    assert "models/simulated" in found["BadRequest"].field_violations[0].description
    assert found["ErrorInfo"].reason == "MODEL_NOT_FOUND"


async def test_a_bad_caller_name_is_refused(server):
    _, channel = server
    call = stubs.GenerationServiceStub(channel).Generate(request(), metadata=(("safelight-caller", "a b"),))
    code, found = await refusal(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(found) == ["metadata safelight-caller"]


async def test_a_deadline_that_cannot_be_met_computes_nothing(start):
    """1000 steps of 50 ms within 20 seconds: the server refuses at once, long before the client's deadline."""
    async with (
        start(**SIMULATED | {"simulated_base_ms": 50.0}) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        call = stubs.GenerationServiceStub(channel).Generate(request(num_inference_steps=1000), timeout=20.0)
        code, found = await refusal(call)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        info = found["ErrorInfo"]
        assert info.reason == "DEADLINE_UNREACHABLE"
        assert float(info.metadata["needed_s"]) > 49
        assert 0 < float(info.metadata["available_s"]) < 21  # gRPC rounds a deadline up on its way
        assert nothing_ran(running)


async def test_a_full_queue_names_its_bound_and_the_time_to_come_back(start):
    limits = {"max_running_outputs": 1, "max_waiting_per_caller": 2}
    async with start(**SIMULATED, **limits) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        with steps_paused(running):
            calls = [stub.Generate(request(num_inference_steps=500)) for _ in range(3)]
            await eventually(lambda: running.inspect().live == 3)
            code, found = await refusal(stub.Generate(request()))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert found["ErrorInfo"].reason == "QUEUE_FULL"
        assert found["ErrorInfo"].metadata["bound"] == "caller"
        assert found["QuotaFailure"].violations[0].subject.startswith("caller default/")
        # one of three generations of 2.5 s must end first
        assert 1 < found["RetryInfo"].retry_delay.ToSeconds() < 5
        other = stub.Generate(request(), metadata=(("safelight-caller", "someone-else"),))
        await eventually(lambda: running.inspect().live == 4)
        for call in (*calls, other):
            call.cancel()


async def test_the_worst_watch_still_gets_its_whole_answer(server):
    _, channel = server
    stub = stubs.GenerationServiceStub(channel)
    [*_, last] = [response.event async for response in stub.Generate(request())]
    offsets = [pb.ArtifactOffset(output_index=index, offset=-1) for index in range(2000)]
    code, found = await refusal(
        stub.WatchGeneration(pb.WatchGenerationRequest(name=last.generation, artifact_offsets=offsets))
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(found) == ["artifact_offsets"] * 16


async def test_streams_of_a_caller_are_bounded_whatever_they_watch(start):
    async with (
        start(**SIMULATED, max_streams_per_caller=2) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        first = stub.Generate(request(num_inference_steps=900))
        name = (await anext(aiter(first))).event.generation
        watch = pb.WatchGenerationRequest(name=name)
        second = stub.WatchGeneration(watch)
        await anext(aiter(second))
        for call in (stub.Generate(request()), stub.WatchGeneration(watch)):
            code, found = await refusal(call)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert found["ErrorInfo"].reason == "TOO_MANY_STREAMS"
            assert found["QuotaFailure"].violations[0].subject == "caller default/127.0.0.1"
            assert found["RetryInfo"].retry_delay.ToSeconds() == 1
        assert (await stub.GetGeneration(pb.GetGenerationRequest(name=name))).generation.name == name
        other = stub.WatchGeneration(watch, metadata=(("safelight-caller", "someone-else"),))
        await anext(aiter(other))
        second.cancel()
        await eventually(lambda: len(running.streams) == 2)
        third = stub.WatchGeneration(watch)
        await anext(aiter(third))
        for call in (first, third, other):
            call.cancel()
        await eventually(lambda: len(running.streams) == 0)


async def test_an_outcome_that_was_lost_frees_its_request_id(server):
    """gRPC retries UNAVAILABLE, so the request must be able to run again under the same id."""
    running, channel = server
    stub, run = stubs.GenerationServiceStub(channel), running.runtime.run

    async def fail(*_given):
        raise RuntimeFailure("unplugged", retryable=True)

    message = request()
    message.request_id = str(uuid.uuid4())
    running.runtime.run = fail
    code, found = await refusal(stub.Generate(message))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert found["ErrorInfo"].reason == "RUNTIME_FAILED"
    running.runtime.run = run
    events = [response.event async for response in stub.Generate(message)]
    assert events[-1].finished.status.code == 0


async def test_a_bug_at_the_start_leaves_no_request_id_behind(server):
    running, channel = server
    stub, planner = stubs.GenerationServiceStub(channel), running.generations._planner
    plan = planner.plan

    async def broken(*_given):
        raise TypeError("a bug")

    message = request()
    message.request_id = str(uuid.uuid4())
    planner.plan = broken
    code, _ = await refusal(stub.Generate(message))
    assert code is grpc.StatusCode.INTERNAL
    planner.plan = plan
    events = [response.event async for response in stub.Generate(message)]
    assert events[-1].finished.status.code == 0
    assert not running.inspect().starting


async def test_the_time_that_looking_takes_counts_against_the_deadline(start):
    """It needs 50 s and has 75 s, of which a slow store takes 40."""
    async with (
        start(**SIMULATED | {"simulated_base_ms": 50.0}) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        planner = running.generations._planner
        plan = planner.plan

        async def slow(generation, branched_from):
            generation.deadline -= 40.0
            return await plan(generation, branched_from)

        planner.plan = slow
        call = stubs.GenerationServiceStub(channel).Generate(request(num_inference_steps=1000), timeout=75.0)
        code, found = await refusal(call)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert found["ErrorInfo"].reason == "DEADLINE_UNREACHABLE"
        assert nothing_ran(running)


async def test_an_outcome_that_is_no_longer_kept_is_not_computed_again(start):
    async with start(**SIMULATED, max_results=1) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        message = request()
        message.request_id = str(uuid.uuid4())
        for sent in (message, request()):
            assert [response.event async for response in stub.Generate(sent)]
        await eventually(lambda: running.inspect().finished == 1)
        code, found = await refusal(stub.Generate(message))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert found["ErrorInfo"].reason == "OUTCOME_EXPIRED"


async def test_a_finished_picture_is_kept_once(server):
    """So that the bound on pictures' bytes bounds their memory."""
    _, channel = server
    stub = stubs.GenerationServiceStub(channel)
    message = request()
    message.cache.mode = pb.CachePolicy.MODE_BYPASS
    events = [response.event async for response in stub.Generate(message)]
    picture = b"".join(event.artifact_chunk.data for event in events)
    got = await stub.GetGeneration(pb.GetGenerationRequest(name=events[0].generation))
    assert got.generation.outputs[0].total_bytes == len(picture)
    gc.collect()
    kept = [one for one in gc.get_objects() if isinstance(one, EncodedPicture) and one.data == picture]
    assert not kept


async def test_a_lost_generation_that_is_not_resumed_by_its_deadline_is_late_and_not_cancelled(server):
    running, channel = server
    stub = stubs.GenerationServiceStub(channel)
    calls = [stub.Generate(request(num_inference_steps=500), timeout=4.0) for _ in range(8)]
    names = [(await call.read()).event.generation for call in calls]
    for call in calls:
        call.cancel()
    await eventually(lambda: not running.inspect().live)
    ended = [running.generations._finished.get(name.partition("/")[2]) for name in names]
    assert {generation.error.reason for generation in ended} == {"DEADLINE_EXCEEDED"}


async def test_while_a_runtime_restarts_requests_with_a_deadline_are_taken_too(server, monkeypatch):
    running, channel = server
    with monkeypatch.context() as patched:
        patched.setattr(type(running.runtime), "num_live", 0)
        patched.setattr(running.runtime, "usable", lambda _free: [])
        running.generations._engine._instances_changed()
        call = stubs.GenerationServiceStub(channel).Generate(request(), timeout=30.0)
        assert (await call.read()).event.HasField("accepted")
    running.generations._engine._instances_changed()
    while (response := await call.read()) is not grpc.aio.EOF:
        last = response.event
    assert last.finished.status.code == 0


async def test_whoever_waits_for_a_runtime_until_the_deadline_is_told_so(server, monkeypatch):
    """By the generation's timer or the engine's, whichever is first; and the request id is free for a retry."""
    running, channel = server
    monkeypatch.setattr(type(running.runtime), "num_live", 0)
    monkeypatch.setattr(running.runtime, "usable", lambda _free: [])
    running.generations._engine._instances_changed()
    call = stubs.GenerationServiceStub(channel).Generate(request(), timeout=30.0)
    name = (await call.read()).event.generation.partition("/")[2]
    running.generations._live[name].expire()
    assert running.generations._finished.get(name).error.reason == "RUNTIME_UNAVAILABLE"
    assert [output.reason.name for output in running.generations._finished.get(name).outputs] == ["FAILED"]


async def test_a_drain_does_not_wait_for_a_generation_that_nobody_watches_any_more(server):
    running, channel = server
    call = stubs.GenerationServiceStub(channel).Generate(request(num_inference_steps=1000))
    name = (await call.read()).event.generation.partition("/")[2]
    draining = asyncio.create_task(running.generations.drain(3600.0))
    await asyncio.sleep(0)
    call.cancel()
    await draining
    assert running.generations._finished.get(name).error.reason == "DRAINING"


async def undelivered(running, channel):
    """A call whose pictures are finished and not read."""
    spec = request(num_inference_steps=1).spec
    spec.outputs.extend(pb.OutputSpec(seed=seed) for seed in range(64))
    raw, previews = (
        pb.PixelEncoding(media_type="application/x-raw-rgba8"),
        pb.PreviewPolicy(method="PREVIEW_METHOD_NONE"),
    )
    call = stubs.GenerationServiceStub(channel).Generate(pb.GenerateRequest(spec=spec, encoding=raw, preview=previews))
    async for response in call:
        if response.event.HasField("artifact_chunk"):
            break
    await eventually(lambda: not running.inspect().live)
    return call


async def finishes(call) -> bool:
    """Whether a call, once it is read, comes to its end."""
    last = [response.event.WhichOneof("event") async for response in call][-1]
    return (last, await call.code()) == ("finished", grpc.StatusCode.OK)


async def test_a_generation_ends_although_its_end_cannot_be_logged(server):
    running, channel = server
    call = stubs.GenerationServiceStub(channel).Generate(request(num_inference_steps=100))
    await eventually(lambda: bool(running.inspect().live))
    [generation] = running.generations._live.values()
    generation._logger = Mock(info=Mock(side_effect=BrokenPipeError))
    assert await finishes(call)
    assert generation._logger.info.called and not running.inspect().live


def small(address: str) -> grpc.aio.Channel:
    """A connection with small buffers for unread data."""
    return grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)


async def test_a_drain_waits_until_what_has_ended_is_delivered(server):
    running, _ = server
    async with small(running.address) as channel:
        call = await undelivered(running, channel)
        draining = asyncio.create_task(running.generations.drain(3600.0))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not draining.done()
        assert await finishes(call)
        await draining


async def test_what_was_handed_to_the_network_is_delivered_within_the_grace(server):
    """Here this takes some seconds; a health watch does not delay the drain."""
    running, _ = server
    relay = await Relay.start(running.address)
    async with grpc.aio.insecure_channel(relay.address) as slow, grpc.aio.insecure_channel(running.address) as other:
        health = health_pb2_grpc.HealthStub(other).Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        call = await undelivered(running, slow)
        relay.delay_s = 0.05
        told = asyncio.ensure_future(health.read())  # grpc's client returns no message of a call that has ended
        drained, finishing = running.drain(3600.0), asyncio.create_task(finishes(call))
        await drained
        relay.cut()  # like the end of the server's process
        assert await finishing
        assert (await told).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await health.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_is_not_delivered_within_the_grace_is_told_where_else_to_ask(server):
    running, _ = server
    async with small(running.address) as channel:
        call = await undelivered(running, channel)
        await running.generations.drain(0.0)
        code, found = await refusal(call)
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert found["ErrorInfo"].metadata["seeds"].startswith("0,1,2,")


async def test_a_drain_with_less_grace_ends_the_one_before_although_nobody_reads(server):
    running, _ = server
    async with small(running.address) as channel:
        call = await undelivered(running, channel)
        first = running.drain(3600.0)
        await running.drain(0.0)
        await first
        call.cancel()


async def test_lost_generations_are_bounded(start):
    async with start(**SIMULATED, max_lost=2) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub, names = stubs.GenerationServiceStub(channel), []
        for number in range(3):
            call = stub.Generate(request(num_inference_steps=900))
            async for response in call:
                names.append(response.event.generation)
                break
            call.cancel()
            lost = min(number + 1, 2)
            await eventually(
                lambda lost=lost, name=names[-1].partition("/")[2]: (
                    running.inspect().suspended == lost and name in running.generations._suspended
                )
            )
        states = [(await stub.GetGeneration(pb.GetGenerationRequest(name=name))).generation.state for name in names]
        suspended = pb.Generation.STATE_SUSPENDED
        assert states == [pb.Generation.STATE_CANCELLED, suspended, suspended]
        resumed = stub.WatchGeneration(pb.WatchGenerationRequest(name=names[1]))
        assert await resumed.read()
        assert list(running.generations._suspended) == [names[2].partition("/")[2]]
        resumed.cancel()


async def test_an_update_with_one_fault_changes_nothing(server):
    running, channel = server
    stub = stubs.GenerationServiceStub(channel)
    call = stub.Generate(request(num_inference_steps=500))
    async for response in call:
        name = response.event.generation
        break
    log, policies = running.generations._live[name.partition("/")[2]].log, []
    log.update_policy = policies.append
    update = pb.UpdateGenerationRequest(name=name, preview=pb.PreviewPolicy(every_n_steps=7))
    update.scheduling.priority = 77
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.UpdateGeneration(update)
    assert fields(details(caught.value)) == ["scheduling.priority"]
    assert not policies
    update.scheduling.priority = pb.PRIORITY_BATCH
    await stub.UpdateGeneration(update)
    assert [policy.every_n_steps for policy in policies] == [7]
    call.cancel()


async def test_models_are_listed_by_page(server):
    _, channel = server
    stub = models_pb2_grpc.ModelServiceStub(channel)
    listed = await stub.ListModels(models_pb2.ListModelsRequest(page_size=1))
    assert [model.name for model in listed.models] == ["models/simulated"]
    assert listed.next_page_token == ""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListModels(models_pb2.ListModelsRequest(page_size=-1, page_token="models/simulated"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(details(caught.value)) == ["page_size", "page_token"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetModel(models_pb2.GetModelRequest(name="models/x"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert fields(details(caught.value)) == ["name"]


async def test_a_huge_request_is_refused_unread(server):
    running, channel = server
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stubs.GenerationServiceStub(channel).Generate(request(prompt="x" * 200_000)).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert nothing_ran(running)
