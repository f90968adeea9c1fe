"""OpenTelemetry: a client span for each generation. Does nothing if OpenTelemetry is not installed.

Needs `opentelemetry-api` (the extra `safelight[tracing]`) and a tracer provider
that the application has set. The span lasts as long as the client reads the
generation, including resumed connections, and is the parent of the server's
spans.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc

from safelight.v1 import generation_pb2 as pb

try:
    from opentelemetry import propagate, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ImportError:
    HAS_API = False
else:
    HAS_API = True

SERVICE, METHOD = "safelight.v1.GenerationService", "Generate"


@contextlib.contextmanager
def client_span(request: pb.GenerateRequest, metadata: list[tuple[str, str]]) -> Iterator[None]:
    """Opens a span for the block and adds its trace context to `metadata`, the metadata of the calls."""
    # Not made the current span: a generator may be closed in another task than the one that entered the block.
    if not HAS_API:
        yield
        return
    attributes = {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": METHOD}
    if request.request_id:
        attributes["safelight.request_id"] = request.request_id
    tracer = trace.get_tracer("safelight.client")
    span = tracer.start_span(f"{SERVICE}/{METHOD}", kind=SpanKind.CLIENT, attributes=attributes)
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span))
    metadata.extend(carrier.items())
    code, message = grpc.StatusCode.OK, ""
    try:
        yield
    except GeneratorExit:
        code, message = grpc.StatusCode.CANCELLED, "no longer followed"
        raise
    except BaseException as error:
        found = getattr(error, "code", grpc.StatusCode.CANCELLED)
        code, message = found if isinstance(found, grpc.StatusCode) else grpc.StatusCode.UNKNOWN, str(error)
        raise
    finally:
        span.set_attribute("rpc.grpc.status_code", int(code.value[0]))
        span.set_attribute("rpc.response.status_code", code.name)
        if code is not grpc.StatusCode.OK:
            span.set_status(Status(StatusCode.ERROR, message or code.name))
        span.end()
