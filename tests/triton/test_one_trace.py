"""A trace in Jaeger has the spans of client, gateway and Triton."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from safelight import Client
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.telemetry.export import otlp_processor

from tests.conftest import Start, eventually
from tests.support.jaeger import Jaeger, jaeger
from tests.support.spans import GENERATE, UNSAMPLED, Spans, follow, from_jaeger, traceparent
from tests.triton.support import TritonServer, triton_server

COVERED = 0.95
TURNS = 4
"""Tries until so much is covered: a busy machine may take the processor away between two spans."""
SEEDS = [
    5,
    6,
    7,
    8,
]  # so that on any machine a step is long compared with the 0.4 ms between the spans of two steps
ARRIVE_S = 30.0  # Triton sends its spans every few seconds


@pytest.fixture(scope="module")
def traces() -> Iterator[Jaeger]:
    with jaeger() as running:
        yield running


@pytest.fixture(scope="module")
def traced_triton(traces: Jaeger) -> Iterator[TritonServer]:
    with triton_server("--otlp", traces.otlp_http) as server:
        yield server


@asynccontextmanager
async def gateway(start: Start, traces: Jaeger, triton: TritonServer) -> AsyncIterator[str]:
    """Runs a server that executes on Triton and sends its spans to Jaeger; yields its address."""
    otlp = f"http://{traces.otlp_grpc}"
    async with start(runtime="triton", triton_url=triton.grpc_url, otlp_endpoint=otlp) as running:
        yield running.address


async def whole(traces: Jaeger, trace_id: str, num_triton: int = 1) -> Spans:
    """Waits until the server's span and enough of Triton's have arrived, since Triton sometimes loses one."""

    def arrived() -> bool:
        spans = from_jaeger(traces.trace(trace_id))
        return bool(spans.named(GENERATE)) and len(spans.named("compute")) >= num_triton

    await eventually(arrived, ARRIVE_S)
    return from_jaeger(traces.trace(trace_id))


def request(seed: int, steps: int = 12) -> pb.GenerateRequest:
    spec = pb.GenerationSpec(prompt="a red potion", outputs=[pb.OutputSpec(seed=seed)], num_inference_steps=steps)
    return pb.GenerateRequest(spec=spec)


@pytest.mark.timeout(180)
async def test_one_trace_holds_every_hop_and_its_leaves_cover_the_stream(start, traces, traced_triton) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "application"}))
    provider.add_span_processor(otlp_processor(f"http://{traces.otlp_grpc}", {}))
    otel.set_tracer_provider(provider)  # as an application does; once in a process
    async with gateway(start, traces, traced_triton) as address, Client(address) as client:
        for turn in range(TURNS):
            with otel.get_tracer("test").start_as_current_span("application") as root:
                trace_id = otel.format_trace_id(root.get_span_context().trace_id)
                async for _ in client.generate("a red potion", seeds=[10 * turn + seed for seed in SEEDS], steps=20):
                    pass
            provider.force_flush()
            await eventually(lambda at=trace_id: len(from_jaeger(traces.trace(at)).named(GENERATE)) == 2, ARRIVE_S)
            spans = await whole(traces, trace_id, 15)
            call, served = spans.named(GENERATE)
            if (share := spans.coverage(served)) >= COVERED:
                break
    assert (call.service, served.service) == ("application", "safelight")
    assert spans.path(served) == f"application > {GENERATE} > {GENERATE}"
    paths = {spans.path(span).removeprefix(f"application > {GENERATE} > ") for span in spans.all}
    output = f"{GENERATE} > output"
    step, compute = f"{output} > denoise > step > batch", "InferRequest > icons_denoiser > compute"
    assert {
        *(f"{GENERATE} > {stage}" for stage in ("resolve", "lookup", "admission", "preview > encode", "write")),
        *(f"{output} > {stage}" for stage in ("queue", "encode", "denoise > wait")),
        *(f"{step} > {stage}" for stage in ("prepare", "await", "collect", compute)),
        f"{output} > text_encode > batch > await",
        f"{output} > decode > batch > await",
    } <= paths
    assert {span.service for span in spans.named("compute")} == {"triton"}
    assert {spans.parent(span).name for span in spans.named("InferRequest")} == {"batch"}
    assert {span.attributes["server.address"] for span in spans.named("batch")} == {traced_triton.grpc_url}
    assert len(spans.named("step")) == 20 * len(SEEDS)
    assert not [span for span in spans.all if span.error]
    print(f"leaves cover {share:.4f} of {(served.end - served.start) / 1e6:.0f} ms, {len(spans.all)} spans")
    assert share >= COVERED


@pytest.mark.timeout(180)
async def test_generations_that_share_batches_are_linked_over_traces(start, traces, traced_triton) -> None:
    async with gateway(start, traces, traced_triton) as address, grpc.aio.insecure_channel(address) as channel:
        for turn in range(TURNS):
            ids = [secrets.token_hex(16) for _ in range(2)]
            asked = [request(100 + 2 * turn + n, 20) for n in range(2)]
            await follow(stubs.GenerationServiceStub(channel), asked, ids)
            both = Spans([span for at in ids for span in (await whole(traces, at, 0)).all])
            shares = [both.of(at).coverage(both.of(at).one(GENERATE)) for at in ids]
            if min(shares) >= COVERED:
                break
    assert min(shares) >= COVERED
    shared = [batch for batch in both.named("batch") if batch.attributes["safelight.batch.outputs"] == 2]
    steps = [batch for batch in shared if both.parent(batch).name == "step" and batch.links]
    assert steps
    for batch in steps:
        [other] = [span for span in both.all if span.span_id in batch.links]
        assert batch.span_id in other.links
        assert {other.trace_id, both.parent(batch).trace_id} == set(ids)
    for trace_id in ids:
        assert len(both.of(trace_id).named("step")) == 20


@pytest.mark.timeout(180)
async def test_an_unsampled_generation_leaves_no_span_anywhere(start, traces, traced_triton) -> None:
    unsampled, sampled = secrets.token_hex(16), secrets.token_hex(16)
    async with gateway(start, traces, traced_triton) as address, grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        await follow(stub, [request(1)], [unsampled], UNSAMPLED)
        await follow(stub, [request(2)], [sampled])
        await whole(traces, sampled)  # what came before it has arrived too
    assert not traces.spans(unsampled)


@pytest.mark.timeout(180)
async def test_cancelled_and_failed_streams_have_their_statuses(start, traces, traced_triton) -> None:
    cancelled, late = secrets.token_hex(16), secrets.token_hex(16)
    async with gateway(start, traces, traced_triton) as address, grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            async for response in stub.Generate(request(1, 50), metadata=traceparent(cancelled)):
                if response.event.progress.step >= 2:
                    await stub.CancelGeneration(pb.CancelGenerationRequest(name=response.event.generation))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request(2, 50), timeout=0.2, metadata=traceparent(late)).read()
            async for _ in stub.Generate(request(2, 50), timeout=0.2, metadata=traceparent(late)):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: bool(from_jaeger(traces.trace(late)).named(GENERATE)), ARRIVE_S)
        first, second = await whole(traces, cancelled), from_jaeger(traces.trace(late))
    root, output = first.one(GENERATE), first.one("output")
    assert (root.attributes["rpc.grpc.status_code"], root.error) == (1, "")
    assert (output.attributes["safelight.finish_reason"], output.error) == ("cancelled", "")
    for root in second.named(GENERATE):
        assert root.attributes["rpc.grpc.status_code"] == 4
        assert root.error in ("DEADLINE_EXCEEDED", "DEADLINE_UNREACHABLE")
