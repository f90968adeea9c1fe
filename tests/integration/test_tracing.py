"""The exported spans of whole generations, on the embedded and the simulated runtime."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable

import grpc
import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from safelight import Client
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.api.identity import new_key
from safelight_server.app import server
from safelight_server.app.server import Running
from safelight_server.domain.component import Component
from safelight_server.runtime.base import RuntimeFailure
from safelight_server.runtime.simulated import SimulatedRuntime
from safelight_server.telemetry import Tracing

from tests.conftest import eventually
from tests.support.http import GENERATIONS, body, client, http_server
from tests.support.pause import steps_paused
from tests.support.spans import GENERATE, UNSAMPLED, WATCH, Spans, follow, from_sdk, traceparent

COVERED = 0.9
"""Share of a stream's time that the spans without children cover at least."""
SIMULATED = {"runtime": "simulated", "simulated_base_ms": 2.0, "simulated_row_ms": 0.1, "num_instances": 1}


def request(seed: int = 7, steps: int = 4, **changes: object) -> pb.GenerateRequest:
    """A short generation without previews."""
    outputs = [pb.OutputSpec(seed=seed)]
    spec = pb.GenerationSpec(prompt="a red potion", outputs=outputs, num_inference_steps=steps)
    preview = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
    return pb.GenerateRequest(spec=spec, preview=preview, **changes)


async def together(running: Running, calls: Awaitable[object], count: int) -> None:
    """Awaits calls whose generations make no step before all of them have been accepted."""
    with steps_paused(running):
        made = asyncio.ensure_future(calls)
        await eventually(lambda: running.inspect().live == count)
    await made


class Recorder:
    """Keeps exported spans, and checks that every span was started and ended once."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._open: dict[int, str] = {}
        self.tracing = Tracing(processor=self)

    def on_start(self, span, parent_context=None) -> None:
        self._open[span.context.span_id] = span.name

    def on_end(self, span) -> None:
        del self._open[span.context.span_id]
        self._exporter.export([span])

    def _on_ending(self, span) -> None:
        pass

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True

    @property
    def open(self) -> list[str]:
        return list(self._open.values())

    def spans(self) -> Spans:
        return from_sdk(self._exporter.get_finished_spans())

    async def settle(self) -> Spans:
        """Waits until no span is open; returns all spans."""
        await eventually(lambda: not self._open)
        assert self.tracing.num_trails == 0
        return self.spans()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    made = Recorder()
    monkeypatch.setattr(server, "Tracing", lambda *_: made.tracing)
    yield made
    assert not made.open
    assert "ended span" not in caplog.text  # the SDK's complaint about a second end


async def test_one_trace_holds_all_stages_under_their_parents(start, recorder) -> None:
    trace_ids = []
    async with start(num_instances=1) as running, grpc.aio.insecure_channel(running.address) as channel:
        for seed in range(5):  # a busy machine may take the processor away between two spans
            trace_ids.append(trace_id := secrets.token_hex(16))
            message = request(seed, steps=16)  # enough that a preview is decoded between two of them on any machine
            message.preview.CopyFrom(pb.PreviewPolicy(method=pb.PREVIEW_METHOD_TINY_DECODER))
            [events] = await follow(stubs.GenerationServiceStub(channel), [message], [trace_id])
            recorded = await recorder.settle()
            spans = recorded.of(trace_id)
            if (share := spans.coverage(spans.one(GENERATE))) >= COVERED:
                break
    assert share >= COVERED
    assert events[0].accepted.trace_id == trace_id
    assert {span.trace_id for span in recorded.all} == set(trace_ids)
    paths = {spans.path(span) for span in spans.all}
    output, denoise = f"{GENERATE} > output", f"{GENERATE} > output > denoise"
    assert paths == {
        GENERATE,
        *(f"{GENERATE} > {stage}" for stage in ("resolve", "lookup", "admission", "write", "preview", "output")),
        *(f"{output} > {stage}" for stage in ("queue", "text_encode", "denoise", "decode", "encode")),
        *(f"{output} > {call} > batch" for call in ("text_encode", "decode")),
        *(f"{denoise} > {stage}" for stage in ("step", "step > batch", "wait")),
        *(f"{GENERATE} > preview > {stage}" for stage in ("decode", "decode > batch", "encode")),
    }
    root = spans.one(GENERATE)
    assert root.parent_id == "00f067aa0ba902b7"
    assert root.attributes["rpc.grpc.status_code"] == 0
    assert root.attributes["safelight.steps"] == 16
    assert [span.attributes["safelight.step"] for span in spans.named("step")] == list(range(1, 17))
    assert spans.one("output").attributes["safelight.finish_reason"] == "completed"
    assert {span.attributes["safelight.batch.rows"] for span in spans.named("batch")} == {1, 2}
    assert not [span for span in spans.all if span.error]


async def test_those_who_share_a_batch_are_linked_with_it_both_ways(start, recorder) -> None:
    trace_ids = [secrets.token_hex(16) for _ in range(3)]
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        requests = [request(n, 20) for n in range(3)]
        await together(running, follow(stubs.GenerationServiceStub(channel), requests, trace_ids), 3)
        spans = await recorder.settle()
    shared = [batch for batch in spans.named("batch") if batch.attributes["safelight.batch.outputs"] == 3]
    assert shared
    for batch in shared:
        owner = spans.parent(batch)
        linked = [span for span in spans.all if span.span_id in batch.links]
        assert {span.name for span in (owner, *linked)} <= {"step", "text_encode", "decode"}
        assert {span.trace_id for span in (owner, *linked)} == set(trace_ids)
        assert all(batch.span_id in span.links for span in linked)
        assert owner.span_id not in batch.links
    for trace_id in trace_ids:
        assert len(spans.of(trace_id).named("step")) == 20


async def test_an_output_that_others_want_too_is_in_every_trace(start, recorder) -> None:
    trace_ids = [secrets.token_hex(16) for _ in range(2)]
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        requests = [request(7, 20), request(7, 20)]
        await together(running, follow(stubs.GenerationServiceStub(channel), requests, trace_ids), 2)
        spans = await recorder.settle()
    dispositions = {spans.of(at).one("output").attributes["safelight.disposition"] for at in trace_ids}
    assert dispositions == {"miss", "coalesced"}
    assert all(spans.of(at).named("step") and spans.of(at).one("encode") for at in trace_ids)
    assert len(spans.named("batch")) < len(spans.named("step"))


async def test_what_the_root_does_not_sample_is_recorded_nowhere(start, recorder) -> None:
    trace_id = secrets.token_hex(16)
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        [events] = await follow(stub, [request()], [trace_id], UNSAMPLED)
        await follow(stub, [request(8)], [secrets.token_hex(16)])
        spans = await recorder.settle()
    assert events[0].accepted.trace_id == trace_id  # logs carry it
    assert not spans.of(trace_id).all
    assert spans.all


async def test_callers_without_a_key_have_nothing_recorded(start, recorder, monkeypatch, tmp_path) -> None:
    recorder.tracing = Tracing(ratio=0.0, processor=recorder, requested_per_s=3)
    monkeypatch.setattr(server, "Tracing", lambda *_: recorder.tracing)
    key, entry = new_key("ann", "studio")
    key_file = tmp_path / "keys.json"
    key_file.write_text(f'{{"keys": [{entry}]}}')
    authorization = (("authorization", f"Bearer {key}"),)
    async with (
        start(api_key_file=key_file, **SIMULATED) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)

        async def ask(key: tuple[tuple[str, str], ...]) -> None:
            metadata = (*traceparent(secrets.token_hex(16)), *key)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetGeneration(pb.GetGenerationRequest(name="generations/x"), metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.WatchGeneration(pb.WatchGenerationRequest(name="generations/x"), metadata=metadata).read()

        for _ in range(20):
            await ask(())
        assert not recorder.spans().all
        await ask(authorization)
        spans = await recorder.settle()
    assert [span.name for span in spans.all] == ["safelight.v1.GenerationService/GetGeneration", WATCH]


async def test_a_traced_generation_beside_others_that_are_not(start, recorder) -> None:
    trace_id = secrets.token_hex(16)
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        others = [request(n, 20) for n in range(3)], [secrets.token_hex(16) for _ in range(3)], UNSAMPLED
        await together(running, asyncio.gather(follow(stub, *others), follow(stub, [request(9, 20)], [trace_id])), 4)
        spans = await recorder.settle()
    assert {span.trace_id for span in spans.all} == {trace_id}
    assert max(span.attributes["safelight.batch.outputs"] for span in spans.named("batch")) == 4
    assert not any(span.links for span in spans.all)


async def test_a_batch_of_others_is_no_part_of_a_trace(start, recorder, monkeypatch) -> None:
    seen, run = [], SimulatedRuntime.run

    async def watching(self, *call):
        seen.append(otel.get_current_span().get_span_context())
        return await run(self, *call)

    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        monkeypatch.setattr(SimulatedRuntime, "run", watching)
        stub = stubs.GenerationServiceStub(channel)
        await follow(stub, [request()], [secrets.token_hex(16)], UNSAMPLED)
        assert not any(context.is_valid for context in seen)
        seen.clear()
        await follow(stub, [request(8)], [secrets.token_hex(16)])
        spans = await recorder.settle()
    own = [context for context in seen if context.is_valid]  # reference prompts are encoded between the steps
    assert [otel.format_span_id(context.span_id) for context in own] == [b.span_id for b in spans.named("batch")]


async def test_a_cancelled_generation_is_no_error(start, recorder) -> None:
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            async for response in stub.Generate(request(steps=900), metadata=traceparent(secrets.token_hex(16))):
                if response.event.progress.step >= 3:
                    await stub.CancelGeneration(pb.CancelGenerationRequest(name=response.event.generation))
        spans = await recorder.settle()
    root, output = spans.one(GENERATE), spans.one("output")
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (1, "")
    assert root.attributes["rpc.response.status_code"] == "CANCELLED"
    assert (output.attributes["safelight.finish_reason"], output.error) == ("cancelled", "")
    assert spans.named("safelight.v1.GenerationService/CancelGeneration")[0].attributes["rpc.grpc.status_code"] == 0


async def test_a_lost_stream_and_its_resumption(start, recorder) -> None:
    first, second = secrets.token_hex(16), secrets.token_hex(16)
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        call = stub.Generate(request(steps=300), metadata=traceparent(first))
        async for response in call:
            if response.event.progress.step >= 3:
                break
        call.cancel()
        [generation] = running.generations._live.values()
        await eventually(lambda: generation.state.name == "SUSPENDED")
        message = pb.WatchGenerationRequest(name=generation.name, preview=request().preview)
        watch = stub.WatchGeneration(message, metadata=traceparent(second))
        assert [response.event async for response in watch][-1].HasField("finished")
        spans = await recorder.settle()
    root, again = spans.one(GENERATE), spans.one(WATCH)
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (1, "")
    assert (again.attributes["rpc.grpc.status_code"], again.links) == (0, {root.span_id})
    mine = spans.of(first)
    assert len(mine.named("step")) >= 300
    assert mine.path(mine.one("suspended")) == f"{GENERATE} > output > suspended"
    assert len(mine.named("denoise")) == 2
    assert mine.one("output").attributes["safelight.finish_reason"] == "completed"
    assert {span.name for span in spans.of(second).all} == {WATCH, "write"}


async def test_a_lost_generation_that_nobody_resumes_and_one_that_is_drained(start, recorder) -> None:
    trace_id = secrets.token_hex(16)
    settings = SIMULATED | {"resume_grace_s": 0.05}
    async with start(**settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        call = stub.Generate(request(steps=900), metadata=traceparent(secrets.token_hex(16)))
        async for response in call:
            if response.event.progress.step >= 3:
                break
        call.cancel()
        await eventually(lambda: bool(recorder.spans().named("output")))
        assert recorder.spans().one("output").attributes["safelight.finish_reason"] == "cancelled"
        call = stub.Generate(request(8, 900), metadata=traceparent(trace_id))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in call:
                if response.event.progress.step >= 3:
                    running.drain(0.0)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        spans = (await recorder.settle()).of(trace_id)
    root, output = spans.one(GENERATE), spans.one("output")
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (14, "DRAINING")
    assert output.error == "DRAINING"


async def test_a_deadline_that_passes_and_a_refusal(start, recorder) -> None:
    late, refused = secrets.token_hex(16), secrets.token_hex(16)
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        message = request(steps=500)
        message.spec.outputs.add(seed=9)
        with pytest.raises(grpc.aio.AioRpcError):
            async for response in stub.Generate(message, timeout=50, metadata=traceparent(late)):
                if response.event.HasField("accepted"):
                    for generation in list(running.generations._live.values()):
                        generation.expire()
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(pb.GenerateRequest(), metadata=traceparent(refused)).read()
        spans = await recorder.settle()
    root = spans.of(late).one(GENERATE)
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (4, "DEADLINE_EXCEEDED")
    assert [span.error for span in spans.of(late).named("output")] == ["DEADLINE_EXCEEDED"] * 2
    root = spans.of(refused).one(GENERATE)
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (3, "")
    assert root.attributes["safelight.reason"] == "INVALID_REQUEST"


async def test_a_request_over_http_is_the_root_of_the_same_stages(recorder) -> None:
    good, late, refused = (secrets.token_hex(16) for _ in range(3))
    async with http_server() as running, client(running) as http:

        async def post(trace_id: str, **parameters: object) -> None:
            await http.post(GENERATIONS, json=body(**parameters), headers=dict(traceparent(trace_id)))

        await post(good)
        posting = asyncio.create_task(post(late, num_inference_steps=1000))
        await eventually(lambda: bool(running.inspect().live))
        [generation] = running.generations._live.values()
        generation.expire()
        await posting
        await post(refused, num_inference_steps=1001)
        spans = await recorder.settle()
    root = spans.of(good).one(GENERATE)
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (0, "")
    paths = {spans.path(span) for span in spans.of(good).all}
    assert {f"{GENERATE} > {stage}" for stage in ("resolve", "lookup", "admission", "output")} < paths
    root = spans.of(late).one(GENERATE)
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (4, "DEADLINE_EXCEEDED")
    root = spans.of(refused).one(GENERATE)
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (3, "")
    assert root.attributes["safelight.reason"] == "INVALID_REQUEST"


async def test_a_call_that_fails_and_is_made_again(start, recorder, monkeypatch) -> None:
    calls, run = iter(range(1000)), SimulatedRuntime.run

    async def stumbling(self, instance, model, component, inputs):
        if component is Component.DENOISER and next(calls) == 3:  # reference prompts are encoded between the steps
            raise RuntimeFailure("it stumbled", retryable=True)
        return await run(self, instance, model, component, inputs)

    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        monkeypatch.setattr(SimulatedRuntime, "run", stumbling)
        await follow(stubs.GenerationServiceStub(channel), [request()], [secrets.token_hex(16)])
        spans = await recorder.settle()
    failed = [span for span in spans.all if span.error]
    assert {(span.name, span.error) for span in failed} == {("step", "it stumbled"), ("batch", "it stumbled")}
    assert len(spans.named("step")) == 5


async def test_the_client_library_begins_the_trace(start, recorder, monkeypatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(otel, "get_tracer", provider.get_tracer)
    async with start(**SIMULATED) as running, Client(running.address) as client:
        async for _ in client.generate("a red potion", steps=3):
            pass
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            async for _ in client.generate("a red potion", steps=100_000):
                pass
        spans = await recorder.settle()
    good, bad = from_sdk(exporter.get_finished_spans()).named(GENERATE)
    assert spans.of(good.trace_id).one(GENERATE).parent_id == good.span_id
    assert (good.attributes["rpc.grpc.status_code"], good.error) == (0, "")
    assert bad.attributes["rpc.grpc.status_code"] == 3
    assert bad.error  # of a client span every status but OK is an error
    assert not spans.of(bad.trace_id).one(GENERATE).error
