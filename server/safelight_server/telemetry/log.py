"""structlog: for people on a console, JSON for machines; trace and generation ids on every line.

Invariant: to log never fails. Lines that cannot be written are dropped.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import TextIO

import structlog
from opentelemetry import trace


class Lossy:
    """A file whose reader may go and whose disk may be full."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Writes, or drops."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or keeps it."""
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


def configure_logging(log_format: str, level: str) -> None:
    """Sets up structlog for the process; log lines go to stderr."""
    json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    renderer = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _add_trace_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(Lossy(sys.stderr)),  # type: ignore[arg-type]  # all it needs
        cache_logger_on_first_use=True,
    )


def _add_trace_id(_logger: object, _method: str, event: MutableMapping[str, object]) -> MutableMapping[str, object]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", format(context.trace_id, "032x"))
    return event
