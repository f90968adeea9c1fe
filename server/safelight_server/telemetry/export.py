"""Exports spans to an OpenTelemetry collector without slowing the server when the collector is slow or dead.

Spans wait in a bounded queue, and a thread of their own sends them; when the queue is
full they are dropped. The loss of the collector is logged once, and its return once. A
collector on this machine is never called through a proxy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlsplit

import structlog
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from safelight.proxies import channel_options, proxy_of

log = structlog.get_logger(__name__)

QUEUE_SPANS = 8192
"""Spans that may wait to be sent, about ten megabytes."""
EXPORT_TIMEOUT_S = 5.0
DELAY_MS = 500
"""Pause between two exports."""
CHATTY = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal")
"""Loggers of the SDK that write a line for every failed export."""


def otlp_processor(endpoint: str, headers: Mapping[str, str]) -> SpanProcessor:
    """A span processor that queues ended spans and sends them to an OTLP gRPC endpoint, with TLS for https:// only."""
    for name in CHATTY:  # `Reporting` logs instead
        logging.getLogger(name).setLevel(logging.CRITICAL)
    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=not endpoint.startswith("https://"),
        headers=tuple(headers.items()),
        timeout=EXPORT_TIMEOUT_S,
        channel_options=tuple(channel_options(urlsplit(endpoint).netloc)),  # type: ignore[arg-type]  # any options
    )
    return BatchSpanProcessor(Reporting(exporter, endpoint), max_queue_size=QUEUE_SPANS, schedule_delay_millis=DELAY_MS)


class Reporting(SpanExporter):
    """Wraps an exporter; logs once when exports begin to fail, and once when they work again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._lost = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends the spans. Logs when exports begin or cease to fail."""
        result = self._exporter.export(spans)
        lost = result is not SpanExportResult.SUCCESS
        if lost and not self._lost:
            through = {"proxy": proxy} if (proxy := proxy_of(urlsplit(self._endpoint).netloc)) else {}
            log.warning("traces_cannot_be_exported", endpoint=self._endpoint, **through)
        elif self._lost and not lost:
            log.info("traces_are_exported_again", endpoint=self._endpoint)
        self._lost = lost
        return result

    def shutdown(self) -> None:
        """Shuts the wrapped exporter down."""
        self._exporter.shutdown()


def close_within(close: Callable[[], None], seconds: float) -> None:
    """Runs `close` in a daemon thread. Returns when it has ended, or after `seconds` at the latest."""
    closing = threading.Thread(target=close, name="traces-close", daemon=True)
    closing.start()
    closing.join(seconds)
