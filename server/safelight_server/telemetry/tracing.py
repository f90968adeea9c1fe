"""OpenTelemetry spans: where a picture's time goes, over every hop; exported over OTLP when an endpoint is configured.

A `Stage` is a span that is recorded, or a place in a trace that is not: then
nothing that begins under it is made. Whether a trace is recorded is decided
once, at its root, and heeded everywhere. The stage that a task works for is
`current()` in it; a runtime finds the span of its call as OpenTelemetry's own
current span, and none where no trace wants it.

Neighbours: `trail.py` has the stages of one output and the spans of shared
calls, `export.py` what carries spans away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from safelight_server.telemetry.export import close_within, otlp_processor

CLOSE_S = 3.0
"""How long the end of the server waits for a collector to take the last spans."""
FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Statuses that are errors of a server; the others its callers' doing (OpenTelemetry's conventions for gRPC)."""
_PROPAGATOR = TraceContextTextMapPropagator()
_NOTHING: Mapping[str, str | int | float] = {}


class Tracing:
    """Begins traces.

    Args:
        endpoint: OTLP gRPC, http:// or https://; empty: nothing is recorded.
        ratio: share of traces recorded that no client decided about.
        headers: sent with every export, such as keys of a collector.
        processor: takes the spans instead of an exporter to `endpoint`.

    Attributes:
        num_trails: outputs on their way that are traced; at 0 calls need not ask whom they serve.
    """

    def __init__(
        self,
        endpoint: str = "",
        ratio: float = 1.0,
        headers: Mapping[str, str] | None = None,
        processor: SpanProcessor | None = None,
    ) -> None:
        self.num_trails = 0
        self._provider: TracerProvider | None = None
        if endpoint or processor is not None:
            resource = Resource.create({"service.name": "safelight"})
            sampler = ParentBased(TraceIdRatioBased(ratio))
            self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
            self._provider.add_span_processor(processor or otlp_processor(endpoint, headers or {}))
        provider: trace.TracerProvider = self._provider or trace.NoOpTracerProvider()
        self.tracer = provider.get_tracer("safelight")

    def server_call(self, service: str, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Stage:
        """The span of a call that came in, a child of what the client's `traceparent` names."""
        carrier = {key: value for key, value in metadata if key in ("traceparent", "tracestate")}
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        span = self.tracer.start_span(
            f"{service}/{method}", _PROPAGATOR.extract(carrier), kind=SpanKind.SERVER, attributes=attributes
        )
        return Stage(self, span)

    def close(self) -> None:
        """Exports what is left, unless the collector keeps it waiting."""
        if self._provider is not None:
            close_within(self._provider.shutdown, CLOSE_S)


class Stage:
    """A span that is recorded, or nothing. What is begun must be ended once.

    Attributes:
        recorded: whether there is a span.
    """

    __slots__ = ("_span", "_tracing", "recorded")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span
        self.recorded = span.is_recording()

    @property
    def tracing(self) -> Tracing:
        """What began its trace."""
        return self._tracing

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, also where the client decided not to record; empty: there is no trace."""
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
        """A stage within this one.

        Args:
            start_ns: when it began, of `time.time_ns`; None: now.
            linked: a stage, of another trace perhaps, that it belongs together with.
        """
        if not self.recorded:
            return self
        links = [] if linked is None else [trace.Link(linked._span.get_span_context())]
        span = self._tracing.tracer.start_span(
            name, trace.set_span_in_context(self._span), links=links, attributes=attributes, start_time=start_ns
        )
        return Stage(self._tracing, span)

    def note(self, attributes: Mapping[str, str | int | float]) -> None:
        """Adds attributes."""
        if self.recorded:
            self._span.set_attributes(attributes)

    def link(self, other: Stage) -> None:
        """Says that another stage, of another trace perhaps, belongs together with this one."""
        if self.recorded and other.recorded:
            self._span.add_link(other._span.get_span_context())

    def end(self, error: str = "", at_ns: int | None = None) -> None:
        """Ends it, as failed where there is an error."""
        if self.recorded:
            if error:
                self._span.set_status(Status(StatusCode.ERROR, error))
            self._span.end(at_ns)

    def end_call(self, code: str, number: int, reason: str = "") -> None:
        """Ends the span of a call that came in, with its status; failed where that is a fault of the server."""
        self.note({"rpc.grpc.status_code": number, "rpc.response.status_code": code})
        if reason:
            self.note({"safelight.reason": reason})
        self.end(fault(code, reason))

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A stage that lasts as long as the block."""
        stage = self.begin(name)
        try:
            yield
        finally:
            stage.end()

    @contextlib.contextmanager
    def as_current(self) -> Iterator[None]:
        """What the block does, and the tasks that it starts, is done for this stage."""
        mine = _CURRENT.set(self)
        theirs = contexts.attach(trace.set_span_in_context(self._span, contexts.Context()))
        try:
            yield
        finally:
            contexts.detach(theirs)
            _CURRENT.reset(mine)

    def enter(self) -> None:
        """From here on this task works for this stage."""
        _CURRENT.set(self)
        contexts.attach(trace.set_span_in_context(self._span, contexts.Context()))


UNTRACED = Stage(Tracing(), trace.INVALID_SPAN)
_CURRENT: ContextVar[Stage] = ContextVar("safelight_stage", default=UNTRACED)


def fault(code: str, reason: str) -> str:
    """The error of a span whose work ended with a status; empty where that is no fault of the server."""
    return (reason or code) if code in FAULTS else ""


def current() -> Stage:
    """The stage that this task works for."""
    return _CURRENT.get()
