"""OpenTelemetry spans per stage; exported over OTLP when an endpoint is configured, else they cost nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Makes spans.

    Args:
        endpoint: OTLP gRPC; empty: nothing is recorded.
        ratio: share of traces kept that no client decided about.
    """

    def __init__(self, endpoint: str = "", ratio: float = 1.0) -> None:
        self._provider: TracerProvider | None = None
        if endpoint:
            self._provider = TracerProvider(
                resource=Resource.create({"service.name": "safelight"}), sampler=ParentBased(TraceIdRatioBased(ratio))
            )
            exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        provider: trace.TracerProvider = self._provider or trace.NoOpTracerProvider()
        self._tracer = provider.get_tracer("safelight")

    def server_span(self, name: str, metadata: Iterable[tuple[str, str | bytes]]) -> Span:
        """The span of a call, a child of what the client's `traceparent` names."""
        carrier = {key: value for key, value in metadata if key in ("traceparent", "tracestate")}
        return self._tracer.start_span(name, _PROPAGATOR.extract(carrier), kind=SpanKind.SERVER)

    def span(self, name: str, parent: Span, links: Sequence[Span] = (), **attributes: str | int | float) -> Span:
        """A stage's span. End it with `end`."""
        context: Context = trace.set_span_in_context(parent)
        linked = [trace.Link(span.get_span_context()) for span in links]
        return self._tracer.start_span(name, context, links=linked, attributes=attributes)

    def close(self) -> None:
        """Exports what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def end(span: Span, error: str = "") -> None:
    """Ends a span, as failed where there is an error."""
    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end()


def trace_id(span: Span) -> str:
    """32 hexadecimal digits, or empty when not traced."""
    context = span.get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else ""
