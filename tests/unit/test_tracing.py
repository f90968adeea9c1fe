"""Stages, trails and the exporter: recorded spans, their status, and the effect of a dead collector."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import structlog
from opentelemetry import trace as otel
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from safelight_server.runtime.triton import server as triton_server
from safelight_server.telemetry import Stage, Tracing, Trail, tracing
from safelight_server.telemetry.export import Reporting, otlp_processor
from safelight_server.telemetry.sampling import RequestSampler
from safelight_server.telemetry.trail import CallSpans

from tests.support.spans import SAMPLED, UNSAMPLED, Spans, from_sdk, traceparent

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Traced:
    """A Tracing that keeps its spans."""

    def __init__(self, ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(ratio=ratio, processor=SimpleSpanProcessor(self._exporter))

    def call(self, flags: str | None = SAMPLED, known: bool = True) -> Stage:
        metadata = traceparent(TRACE, flags) if flags else ()
        return self.tracing.server_call("service", "Method", metadata, known=known)

    @property
    def spans(self) -> Spans:
        return from_sdk(self._exporter.get_finished_spans())


@pytest.mark.parametrize(
    ("flags", "ratio", "recorded"),
    [(SAMPLED, 0.0, True), (UNSAMPLED, 1.0, False), (None, 1.0, True), (None, 0.0, False)],
)
def test_the_root_decides_and_the_ratio_only_where_nobody_has(flags, ratio, recorded) -> None:
    stage = Traced(ratio).call(flags)
    assert stage.recorded is recorded
    assert bool(stage.trace_id)
    assert not flags or stage.trace_id == TRACE


def test_under_what_is_not_recorded_nothing_begins() -> None:
    traced = Traced()
    stage = traced.call(UNSAMPLED)
    assert stage.begin("below") is stage
    with stage.within("below"):
        pass
    stage.end_call("INTERNAL", 13)
    assert not traced.spans.all
    assert Tracing().server_call("service", "Method", (), known=True).trace_id == ""


@pytest.mark.parametrize(("flags", "ratio", "recorded"), [(SAMPLED, 0.0, False), (UNSAMPLED, 1.0, True)])
def test_a_caller_whom_nobody_knows_decides_nothing(flags, ratio, recorded) -> None:
    stage = Traced(ratio).call(flags, known=False)
    assert stage.recorded is recorded
    assert stage.trace_id not in ("", TRACE)
    assert Tracing().server_call("service", "Method", traceparent(TRACE), known=False).trace_id == ""


def recorded_of(sampler: RequestSampler, count: int) -> int:
    results = [sampler.should_sample(None, trace_id, "name") for trace_id in range(count)]
    return sum(result.decision.is_sampled() for result in results)


@pytest.mark.parametrize(("ratio", "beyond"), [(0.0, 0), (0.25, 25), (1.0, 100)])
def test_callers_who_are_known_have_as_many_recorded_as_the_rate_says(ratio, beyond) -> None:
    now = [100.0]
    chances = itertools.cycle(number / 100 for number in range(100))
    sampler = RequestSampler(ratio, 10.0, lambda: now[0], lambda: next(chances))
    assert recorded_of(sampler, 10) == 10
    assert recorded_of(sampler, 100) == beyond
    now[0] += 0.5
    assert recorded_of(sampler, 5) == 5
    assert recorded_of(sampler, 100) == beyond
    now[0] += 3600.0
    assert recorded_of(sampler, 110) == 10 + beyond
    chances = itertools.cycle(number / 100 for number in range(100))
    assert recorded_of(RequestSampler(ratio, 0.0, lambda: now[0], lambda: next(chances)), 100) == beyond


def test_a_trace_state_is_passed_on_unless_it_is_too_long() -> None:
    traced = Traced()
    for state in ("a=b", f"a={'b' * 200},c={'d' * 200},e={'f' * 200}"):
        stage = traced.tracing.server_call(
            "service", "Method", (*traceparent(TRACE), ("tracestate", state)), known=True
        )
        with stage.as_current():
            assert otel.get_current_span().get_span_context().trace_state.to_header() == (
                "a=b" if len(state) == 3 else ""
            )
        stage.end()


@pytest.mark.parametrize(
    ("code", "number", "error"),
    [
        ("OK", 0, ""),
        ("CANCELLED", 1, ""),
        ("INVALID_ARGUMENT", 3, ""),
        ("DEADLINE_EXCEEDED", 4, "WHY"),
        ("NOT_FOUND", 5, ""),
        ("RESOURCE_EXHAUSTED", 8, ""),
        ("INTERNAL", 13, "WHY"),
        ("UNAVAILABLE", 14, "WHY"),
    ],
)
def test_only_faults_of_the_server_are_errors(code, number, error) -> None:
    traced = Traced()
    traced.call().end_call(code, number, "WHY")
    [span] = traced.spans.all
    assert (span.attributes["rpc.grpc.status_code"], span.attributes["rpc.response.status_code"]) == (number, code)
    assert span.error == error


async def test_tasks_work_for_the_stage_that_was_current_when_they_began() -> None:
    stage = Traced().call()

    async def work() -> tuple[Stage, str]:
        return tracing.current(), otel.format_trace_id(otel.get_current_span().get_span_context().trace_id)

    with stage.as_current():
        task = asyncio.create_task(work())
    assert await task == (stage, TRACE)
    assert tracing.current() is tracing.UNTRACED
    stage.end()


def test_triton_is_sent_a_header_for_what_is_recorded_only() -> None:
    traced = Traced()
    recorded = traced.call()
    with recorded.as_current():
        headers = triton_server._trace_headers()
        assert headers is not None
        assert headers["traceparent"].split("-")[1::2] == [TRACE, "01"]
    for stage in (traced.call(UNSAMPLED), tracing.UNTRACED):
        with stage.as_current():
            assert triton_server._trace_headers() is None
    recorded.end()


def test_an_output_that_ends_during_a_call_ends_before_it_and_both_once() -> None:
    traced = Traced()
    root = traced.call()
    trail = Trail(root, {})
    assert traced.tracing.num_trails == 1
    with CallSpans("step", [(trail, {})], {}):
        trail.end({"safelight.finish_reason": "cancelled"})
    assert traced.tracing.num_trails == 0
    root.end()
    spans = traced.spans
    assert sorted(span.name for span in spans.all) == sorted(
        ["service/Method", "output", "queue", "denoise", "step", "batch"]
    )
    assert spans.one("denoise").end == spans.one("output").end <= spans.one("step").end


def test_waits_and_calls_of_an_output_do_not_overlap() -> None:
    traced = Traced()
    root = traced.call()
    trail = Trail(root, {})
    for name in ("text_encode", "step", "step", "decode"):
        with CallSpans(name, [(trail, {})], {}):
            pass
    trail.developed()
    trail.suspend()
    trail.resume()
    trail.end({})
    root.end()
    spans = traced.spans
    assert len(spans.named("queue")) == 2
    order = sorted(spans.leaves(), key=lambda span: (span.start, span.end))
    assert [span.name for span in order if span.name not in ("queue", "wait")] == [
        *["batch"] * 4,
        "encode",
        "suspended",
    ]
    assert all(one.end <= other.start for one, other in itertools.pairwise(order))


def test_a_call_that_fails_is_an_error_in_every_trace() -> None:
    traced = Traced()
    root = traced.call()
    trails = [Trail(root, {}) for _ in range(2)]
    with pytest.raises(ValueError, match="broken"), CallSpans("step", [(trail, {}) for trail in trails], {}):
        raise ValueError("broken")
    for trail in trails:
        trail.end({})
    assert [span.error for span in traced.spans.named("step")] == ["broken"] * 2
    assert traced.spans.one("batch").error == "broken"


def test_a_lost_collector_is_told_once_and_once_that_it_is_back() -> None:
    results = iter([SpanExportResult.FAILURE, SpanExportResult.FAILURE, SpanExportResult.SUCCESS])

    class Collector(SpanExporter):
        def export(self, spans) -> SpanExportResult:
            return next(results)

    reporting = Reporting(Collector(), "http://nowhere")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            reporting.export([])
    assert [line["event"] for line in logs] == ["traces_cannot_be_exported", "traces_are_exported_again"]


@pytest.mark.parametrize(
    ("endpoint", "named"),
    [("http://collector.example:4317", {"proxy": "http_proxy=http://proxy.example:3128"}), ("http://127.0.0.1:9", {})],
)
def test_a_collector_that_a_proxy_may_hide_is_told_with_the_proxy(endpoint, named, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)

    class Nobody(SpanExporter):
        def export(self, spans) -> SpanExportResult:
            return SpanExportResult.FAILURE

    with structlog.testing.capture_logs() as logs:
        Reporting(Nobody(), endpoint).export([])
    assert logs == [{"event": "traces_cannot_be_exported", "log_level": "warning", "endpoint": endpoint} | named]


def test_a_collector_on_this_machine_is_reached_where_a_proxy_is_set(monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    taken: list[str] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):  # noqa: N802
            taken.extend(span.name for at in request.resource_spans for of in at.scope_spans for span in of.spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    tracing = Tracing(processor=otlp_processor(f"http://127.0.0.1:{port}", {}))
    tracing.server_call("service", "Method", (), known=True).end()
    tracing.close()
    server.stop(0)
    assert taken == ["service/Method"]


def test_without_a_collector_spans_end_and_the_server_too() -> None:
    made = Tracing("http://127.0.0.1:9", headers={"key": "value"})  # nothing listens on discard
    for _ in range(20_000):
        made.server_call("service", "Method", (), known=True).end()
    made.close()
