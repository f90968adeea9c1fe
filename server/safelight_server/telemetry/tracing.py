"""OpenTelemetry tracing: spans show where a picture's time goes; exported over OTLP when an endpoint is configured.

A `Stage` wraps a span. In a trace that is not recorded it creates no spans at
all. The root of a trace decides whether it is recorded, and everything below
keeps to that decision. `current()` is the stage that the running task works
for; a runtime finds the span of its call as OpenTelemetry's own current span,
which is invalid where no recorded trace takes part in the call.

`trail.py` has the stages of one output and the spans of calls that outputs
share, `sampling.py` what is recorded, `export.py` the exporter.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from safelight_server.telemetry.export import close_within, otlp_processor
from safelight_server.telemetry.sampling import build_sampler

CLOSE_S = 3.0
"""How long shutdown waits for the collector to take the last spans."""
FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""gRPC statuses that are the server's fault; the others are the caller's (OpenTelemetry's conventions for gRPC)."""
TRACE_STATE_CHARS = 512
"""Longest `tracestate` that is passed on; W3C Trace Context requires at least so much."""
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # it warns of each malformed tracestate
_PROPAGATOR = TraceContextTextMapPropagator()
_NOTHING: Mapping[str, str | int | float] = {}
_NO_STAGE = contextlib.nullcontext()


class Tracing:
    """Starts the traces of one server.

    Args:
        endpoint: URL of an OTLP gRPC collector, http:// or https://; empty: nothing is recorded.
        ratio: share (0 to 1) of the traces recorded that come without a sampled flag of a known caller.
        headers: headers of every export, such as the collector's key.
        requested_per_s: traces per second that known callers may have recorded by their flag; `ratio` beyond that.
        processor: gets the spans instead of an exporter to `endpoint`; for tests.

    Attributes:
        num_trails: traced outputs that have not ended; at 0 a call does not look for outputs to trace.
    """

    def __init__(
        self,
        endpoint: str = "",
        ratio: float = 1.0,
        headers: Mapping[str, str] | None = None,
        requested_per_s: float = 100.0,
        processor: SpanProcessor | None = None,
    ) -> None:
        self.num_trails = 0
        self._provider: TracerProvider | None = None
        if endpoint or processor is not None:
            resource = Resource.create({"service.name": "safelight"})
            sampler = build_sampler(ratio, requested_per_s)
            self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
            self._provider.add_span_processor(processor or otlp_processor(endpoint, headers or {}))
        provider: trace.TracerProvider = self._provider or trace.NoOpTracerProvider()
        self.tracer = provider.get_tracer("safelight")

    def server_call(
        self, service: str, method: str, metadata: Iterable[tuple[str, str | bytes]], *, known: bool
    ) -> Stage:
        """Starts the span of an incoming call: for a known caller as a child of the span in its `traceparent`.

        Args:
            known: whether the server knows the caller. The call of an unknown caller begins a trace of its own.
        """
        carrier = {key: value for key, value in metadata if key in ("traceparent", "tracestate")} if known else {}
        if len(carrier.get("tracestate", "")) > TRACE_STATE_CHARS:
            del carrier["tracestate"]
        if self._provider is None and not carrier:
            return Stage(self, trace.INVALID_SPAN)
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        parent = _PROPAGATOR.extract(carrier, contexts.Context())
        span = self.tracer.start_span(f"{service}/{method}", parent, kind=SpanKind.SERVER, attributes=attributes)
        return Stage(self, span)

    def close(self) -> None:
        """Exports the remaining spans; waits at most `CLOSE_S` seconds."""
        if self._provider is not None:
            close_within(self._provider.shutdown, CLOSE_S)


class Stage:
    """A span, or in a trace that is not recorded a stand-in that records nothing. Each must be ended once.

    Attributes:
        recorded: whether the span is recorded.
    """

    __slots__ = ("_span", "_tracing", "recorded")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span
        self.recorded = span.is_recording()

    @property
    def tracing(self) -> Tracing:
        """The `Tracing` that started its trace."""
        return self._tracing

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, also if the client has decided against recording; empty without a trace."""
        context = self._span.get_span_context()
        return trace.format_trace_id(context.trace_id) if context.is_valid else ""

    def begin(
        self,
        name: str,
        attributes: Mapping[str, str | int | float] = _NOTHING,
        *,
        start_ns: int | None = None,
        linked: Stage | None = None,
    ) -> Stage:
        """Starts a child stage. Returns this stage itself if it is not recorded.

        Args:
            start_ns: start time, of `time.time_ns`; None: now.
            linked: a related stage, perhaps of another trace, to link to.
        """
        if not self.recorded:
            return self
        links = [] if linked is None else [trace.Link(linked._span.get_span_context())]
        span = self._tracing.tracer.start_span(
            name, trace.set_span_in_context(self._span), links=links, attributes=attributes, start_time=start_ns
        )
        return Stage(self._tracing, span)

    def note(self, attributes: Mapping[str, str | int | float]) -> None:
        """Adds attributes to the span."""
        if self.recorded:
            self._span.set_attributes(attributes)

    def link(self, other: Stage) -> None:
        """Links the span to a related one, perhaps of another trace."""
        if self.recorded and other.recorded:
            self._span.add_link(other._span.get_span_context())

    def end(self, error: str = "", at_ns: int | None = None) -> None:
        """Ends the span, with status ERROR if `error` is not empty, at `at_ns` of `time.time_ns` (None: now)."""
        if self.recorded:
            if error:
                self._span.set_status(Status(StatusCode.ERROR, error))
            self._span.end(at_ns)

    def end_call(self, code: str, number: int, reason: str = "") -> None:
        """Ends the span of an incoming call with its gRPC status, name and number; ERROR for the server's faults."""
        self.note({"rpc.grpc.status_code": number, "rpc.response.status_code": code})
        if reason:
            self.note({"safelight.reason": reason})
        self.end(fault(code, reason))

    def within(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A child stage that lasts as long as the block."""
        return self._within(name) if self.recorded else _NO_STAGE

    @contextlib.contextmanager
    def _within(self, name: str) -> Iterator[None]:
        stage = self.begin(name)
        try:
            yield
        finally:
            stage.end()

    @contextlib.contextmanager
    def as_current(self) -> Iterator[None]:
        """Makes this stage `current()` in the block and in tasks started there."""
        stage_token = _CURRENT.set(self)
        span_token = contexts.attach(trace.set_span_in_context(self._span, contexts.Context()))
        try:
            yield
        finally:
            contexts.detach(span_token)
            _CURRENT.reset(stage_token)

    def enter(self) -> None:
        """Makes this stage `current()` for the rest of the running task."""
        _CURRENT.set(self)
        contexts.attach(trace.set_span_in_context(self._span, contexts.Context()))


UNTRACED = Stage(Tracing(), trace.INVALID_SPAN)
_CURRENT: ContextVar[Stage] = ContextVar("safelight_stage", default=UNTRACED)


def fault(code: str, reason: str) -> str:
    """The error text of a span that ended with this gRPC status; empty if the status is not the server's fault."""
    return (reason or code) if code in FAULTS else ""


def current() -> Stage:
    """The stage that the running task works for; `UNTRACED` if there is none."""
    return _CURRENT.get()
