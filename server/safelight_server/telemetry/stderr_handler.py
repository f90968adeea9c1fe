"""Writes log lines to stderr in a thread, so that a pipe that nobody reads does not block the code that logs.

`logging.handlers.QueueListener` would not do: its handler holds a lock while it writes, and `logging.shutdown` waits
for that lock when the process ends.

Invariants: logging a line never waits for stderr; at most `MAX_LINES` lines wait, and those beyond are dropped and
counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import threading

import structlog

log = structlog.get_logger(__name__)

STDERR = 2
"""The file descriptor, not `sys.stderr`: a thread that waits there holds its lock, which makes Python abort at exit."""
MAX_LINES = 10_000
"""Most lines that wait to be written: about 4 MB of usual lines."""
LAST_LINES_S = 2.0
"""How long the end of the process waits until the last lines are written."""


class StderrHandler(logging.Handler):
    """Formats lines where they are logged, and writes them in a thread.

    A line that cannot be written is dropped. When lines were dropped because too many waited, a line
    `log_lines_dropped` with their number is written before the next one.
    """

    def __init__(self) -> None:
        super().__init__()
        # Not Queue: a destructor that runs during `put` may log as well, which only SimpleQueue allows.
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._num_dropped = 0
        self._writer = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Formats a line and hands it to the thread. `logging` calls this under the handler's lock."""
        if self._lines.qsize() >= MAX_LINES:
            self._num_dropped += 1
            return
        if self._num_dropped:
            num_dropped, self._num_dropped = self._num_dropped, 0
            log.warning("log_lines_dropped", num_lines=num_dropped)  # calls this method
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # noqa: BLE001  # arguments that do not fit the message raise anything
            self.handleError(record)
            return
        if self._writer.is_alive():
            self._lines.put(line)
        else:  # destructors may log after `logging.shutdown`
            _write(line)

    def close(self) -> None:
        """Waits until all lines are written, at most `LAST_LINES_S`. `logging` calls this at the end of the process."""
        self._lines.put(None)
        self._writer.join(LAST_LINES_S)
        super().close()

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            _write(line)


def _write(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the reader has closed the pipe, or the disk is full
        while line:
            try:
                line = line[os.write(STDERR, line) :]
            except BlockingIOError:  # another process has made the pipe that it shares non-blocking
                select.select([], [STDERR], [])
