"""Log lines: whoever writes one, it is one, and nothing happens where it cannot be written."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import structlog
from safelight_server.telemetry import configure_logging

ROOT = Path(__file__).parent.parent.parent
LOGS = """
import structlog
from safelight_server.telemetry import configure_logging
configure_logging("json", "info")
for number in range(1000):
    structlog.get_logger().info("a line", number=number)
print("all logged")
"""


class Broken(io.StringIO):
    """A file that fails when it is flushed, and takes lines again later."""

    error: Exception | None = None

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def restored(monkeypatch):
    """The configuration of all logging is after the test as it was before."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    for module, hook in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield
        logging.captureWarnings(False)
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")])
@pytest.mark.usefixtures("restored")
def test_a_line_that_cannot_be_written_changes_nothing_for_who_logs(monkeypatch, log_format, error):
    stderr = Broken()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging(log_format, "info")
    log = structlog.get_logger()
    stderr.error = error
    log.info("dropped")
    stderr.error = None
    log.info("written")
    assert "written" in stderr.getvalue()
    assert "Traceback" not in stderr.getvalue()
    stderr.close()
    log.info("dropped as well")


def test_nor_for_the_end_of_the_process():
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python"}
    command = [sys.executable, "-c", LOGS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, text=True, env=env, timeout=50, check=False)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "all logged\n")


FORGED = '\n{"event": "keys_reloaded", "level": "info"}\x1b[2J\u2028'
"""What someone may send who wants a line of the log to be his."""


def write_all_kinds() -> None:
    """One line of each kind, most of them with `FORGED` in them."""
    structlog.get_logger("ours").info("refused", message=FORGED)
    theirs = logging.getLogger("a.library")
    theirs.warning("bad value %s", FORGED)
    theirs.warning("one argument is missing: %s %s", FORGED)  # this line is dropped
    theirs.info("quiet")  # of libraries only warnings are shown
    warnings.warn(f"careful {FORGED}", stacklevel=1)
    try:
        raise ValueError(FORGED)
    except ValueError:
        theirs.exception("their bug")
        sys.excepthook(*sys.exc_info())

    def fail() -> None:
        raise ValueError(FORGED)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()

    class Fails:
        def __del__(self) -> None:
            raise ValueError(FORGED)

    Fails()


@pytest.mark.usefixtures("restored")
def test_whoever_logs_writes_one_object_a_line(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("json", "info")
    write_all_kinds()
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    refused, bad_value, warned, *faults = lines
    assert (refused["event"], refused["level"]) == ("refused", "info")
    assert (bad_value["event"], bad_value["logger"]) == (f"bad value {FORGED}", "a.library")
    assert FORGED in warned["event"]
    assert [line["event"] for line in faults] == ["their bug", *["uncaught_exception"] * 3]
    assert all(FORGED in line["exception"] for line in faults)


@pytest.mark.usefixtures("restored")
def test_on_a_console_nobody_moves_the_cursor_or_begins_a_line(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("NO_COLOR", "1")
    configure_logging("console", "info")
    write_all_kinds()
    text = stderr.getvalue()
    assert "\x1b[2J" not in text
    assert "\u2028" not in text
    [bad_value] = [line for line in text.splitlines() if "bad value" in line]
    assert "keys_reloaded" in bad_value


def test_grpc_writes_no_lines_of_its_own():
    """Its core would: a client that does not speak TLS is enough. It looks at the variable when it is imported."""
    code = "import os; import safelight_server.cli.main; print(os.environ['GRPC_VERBOSITY'])"
    env = {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python", "PATH": "/usr/bin"}
    for given, there in (({}, "NONE"), ({"GRPC_VERBOSITY": "INFO"}, "INFO")):
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env | given, check=True)
        assert done.stdout.decode().strip() == there
