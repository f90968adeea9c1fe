"""Carries spans to a collector, which may be slow, dead or absent: nothing else may notice.

Spans wait in a bounded queue and leave from a thread of their own; beyond it
they are dropped. That a collector is lost is logged once, and once that it is
back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import structlog
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

log = structlog.get_logger(__name__)

QUEUE_SPANS = 8192
"""About ten megabytes."""
EXPORT_TIMEOUT_S = 5.0
DELAY_MS = 500
CHATTY = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal")


def otlp_processor(endpoint: str, headers: Mapping[str, str]) -> SpanProcessor:
    """Takes ended spans without delay and sends them to an OTLP gRPC endpoint; plain text unless it is https://."""
    for name in CHATTY:  # they write a line for every failure
        logging.getLogger(name).setLevel(logging.CRITICAL)
    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=not endpoint.startswith("https://"),
        headers=tuple(headers.items()),
        timeout=EXPORT_TIMEOUT_S,
    )
    return BatchSpanProcessor(Reporting(exporter, endpoint), max_queue_size=QUEUE_SPANS, schedule_delay_millis=DELAY_MS)


class Reporting(SpanExporter):
    """An exporter whose failures are told once."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._lost = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Hands on."""
        result = self._exporter.export(spans)
        lost = result is not SpanExportResult.SUCCESS
        if lost and not self._lost:
            log.warning("traces_cannot_be_exported", endpoint=self._endpoint)
        elif self._lost and not lost:
            log.info("traces_are_exported_again", endpoint=self._endpoint)
        self._lost = lost
        return result

    def shutdown(self) -> None:
        """Hands on."""
        self._exporter.shutdown()


def close_within(close: Callable[[], None], seconds: float) -> None:
    """Runs `close`, and leaves it behind when it takes longer."""
    closing = threading.Thread(target=close, name="traces-close", daemon=True)
    closing.start()
    closing.join(seconds)
