"""Sets up structured logging: readable lines on a console, JSON elsewhere, with trace and generation ids.

Invariant: logging never raises. A line that cannot be written is dropped.
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
    """Wraps a text file so that a closed pipe or a full disk loses log lines instead of raising."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Writes the text, or drops it where the file takes none; returns its length either way."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the file, if it can be written."""
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


def configure_logging(log_format: str, level: str) -> None:
    """Sets up structlog for the process, on stderr. `log_format` is auto, console or json; `level` such as "info"."""
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
    """A structlog processor: adds the id of the current trace, 32 hexadecimal digits, where there is one."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", format(context.trace_id, "032x"))
    return event
