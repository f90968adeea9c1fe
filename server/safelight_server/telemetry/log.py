"""Sets up logging: every record, also of libraries, is one JSON object on stderr, or one readable line on a console.

Log records and warnings of libraries, and uncaught exceptions, are formatted like the server's own lines. So text that
a client sent cannot begin a line of its own, in whatever message it appears.

Invariants: logging never raises, and never waits for stderr. A line that cannot be written or formatted is dropped.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import MutableMapping
from types import TracebackType

import structlog
from opentelemetry import trace
from structlog.stdlib import ProcessorFormatter
from structlog.typing import Processor

from safelight_server.telemetry.stderr_handler import StderrHandler

Event = MutableMapping[str, object]
OWN = "safelight"
"""The logger of Python's `logging` that all lines of the server use."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that end a line or command a terminal."""
TRACEBACKS = ("exception", "stack")
"""Keys whose values have lines of their own on a console."""


def configure_logging(log_format: str, level: str) -> None:
    """Sets up logging for the process, on stderr.

    Args:
        log_format: auto, console or json; auto is console on a terminal.
        level: lowest level of the server's own lines, such as "info". Of libraries only warnings and errors are shown.
    """
    lowest = logging.getLevelNamesMapping()[level.upper()]
    to_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_trace_id,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    console: list[Processor] = [
        _escape_control,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
    handler = StderrHandler()
    handler.setFormatter(
        ProcessorFormatter(
            processors=[
                ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                *([structlog.processors.JSONRenderer()] if to_json else console),
            ],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *chain],
            use_get_message=True,
        )
    )
    logging.raiseExceptions = False  # otherwise `logging` prints a traceback when it cannot write or format a line
    root, own = logging.getLogger(), logging.getLogger(OWN)
    for earlier in root.handlers:
        if isinstance(earlier, StderrHandler):
            earlier.close()
    root.handlers[:] = [handler]
    root.setLevel(max(lowest, logging.WARNING))
    own.setLevel(lowest)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*chain, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=lambda *_: own,
        cache_logger_on_first_use=True,
    )
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    structlog.get_logger(__name__).error("uncaught_exception", exc_info=(kind, error, traceback))


def _add_trace_id(_logger: object, _method: str, event: Event) -> Event:
    """A structlog processor: adds the id of the current trace, if there is one, as 32 hexadecimal digits."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", format(context.trace_id, "032x"))
    return event


def _escape_control(_logger: object, _method: str, event: Event) -> Event:
    """A structlog processor: escapes control characters; in tracebacks it keeps the line breaks."""
    for key, value in event.items():
        if isinstance(value, str):
            lines = value.split("\n") if key in TRACEBACKS else [value]
            event[key] = "\n".join(CONTROL.sub(lambda found: repr(found[0])[1:-1], line) for line in lines)
    return event
