"""Logging: each record is exactly one line, whatever it contains, and a failing write has no effect."""

from __future__ import annotations

import contextlib
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
from safelight_server.telemetry.log import OWN
from safelight_server.telemetry.stderr_handler import StderrHandler

ROOT = Path(__file__).parent.parent.parent
LOGS = """
import structlog
from safelight_server.telemetry import configure_logging
configure_logging("json", "info")
for number in range(1000):
    structlog.get_logger().info("a line", number=number)
print("all logged")
"""


def close_handler() -> None:
    """Waits until all lines are written."""
    for handler in (*logging.getLogger().handlers, *logging.getLogger(OWN).handlers):
        if isinstance(handler, StderrHandler):
            handler.close()


@pytest.fixture
def restored(monkeypatch):
    """Restores the configuration of all logging after the test."""
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
    close_handler()
    root.handlers[:] = handlers
    root.setLevel(level)


@contextlib.contextmanager
def stderr_is(file: int):
    """Redirects stderr to another file during the block."""
    before = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("where", ["a pipe without a reader", "/dev/full"])
@pytest.mark.usefixtures("restored")
def test_a_line_that_cannot_be_written_changes_nothing_for_who_logs(tmp_path, log_format, where):
    if where == "/dev/full":
        broken = os.open(where, os.O_WRONLY)
    else:
        reader, broken = os.pipe()
        os.close(reader)
    log = structlog.get_logger()
    with stderr_is(broken):
        configure_logging(log_format, "info")
        log.info("dropped")
        close_handler()
        log.info("dropped as well, after the thread has ended")
    with (tmp_path / "log").open("wb") as file, stderr_is(file.fileno()):
        log.info("written")
    os.close(broken)
    text = (tmp_path / "log").read_text()
    assert "written" in text
    assert "dropped" not in text
    assert "Traceback" not in text


def full_pipe() -> tuple[int, int]:
    """A pipe whose buffer is full. Returns its two ends."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    for size in (1 << 16, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"x" * size)
    os.set_blocking(write, True)
    return read, write


FILLS = """
import logging
import sys
import time
import structlog
from safelight_server.telemetry import configure_logging, stderr_handler
stderr_handler.MAX_LINES = 100
stderr_handler.LAST_LINES_S = float(sys.argv[1])
configure_logging("json", "info")
structlog.get_logger().info("the first line")
(lines,) = (handler._lines for handler in logging.getLogger().handlers)
while lines.qsize():  # until the thread has taken it, and stands at the full pipe
    time.sleep(0.001)
for number in range(150):
    structlog.get_logger().info("a line", number=number)
print("all logged", flush=True)
if sys.stdin.readline():
    structlog.get_logger().info("the last line")
"""


@contextlib.contextmanager
def logging_into_a_full_pipe(last_lines_s: float):
    """A process that logs a line, which cannot be written, and 150 where 100 may wait.

    Yields it and the end of the pipe from which they are read.
    """
    read, write = full_pipe()
    env = os.environ | {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python"}
    command = [sys.executable, "-c", FILLS, str(last_lines_s)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, stderr=write, text=True, env=env, **pipes) as process:
        os.close(write)
        try:
            yield process, read
        finally:
            process.kill()
            os.close(read)


def test_a_pipe_that_nobody_reads_stops_nobody_who_logs():
    with logging_into_a_full_pipe(0.0) as (process, _):
        assert process.communicate(timeout=50)[0] == "all logged\n"
        assert process.returncode == 0


def test_the_process_ends_after_its_last_lines():
    with logging_into_a_full_pipe(20.0) as (process, read):
        process.stdin.close()
        assert process.stdout.readline() == "all logged\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        text = b""
        while more := os.read(read, 1 << 20):
            text += more
        assert process.wait(20) == 0
    assert len(text.lstrip(b"x").splitlines()) == 101


def test_lines_beyond_the_bound_are_dropped_and_counted():
    with logging_into_a_full_pipe(20.0) as (process, read):
        assert process.stdout.readline() == "all logged\n"
        text = b""
        while b'"number": 99,' not in text:  # there is room again
            text += os.read(read, 1 << 20)
        process.stdin.write("\n")
        process.stdin.close()
        while more := os.read(read, 1 << 20):
            text += more
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in text.lstrip(b"x").splitlines()]
    numbers = [line["number"] for line in lines if line["event"] == "a line"]
    first, dropped, last = lines[0], *lines[-2:]
    assert first["event"] == "the first line"
    assert numbers == list(range(100))
    assert (dropped["event"], dropped["num_lines"]) == ("log_lines_dropped", 50)
    assert last["event"] == "the last line"


def test_nor_for_the_end_of_the_process():
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python"}
    command = [sys.executable, "-c", LOGS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, text=True, env=env, timeout=50, check=False)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "all logged\n")


FORGED = '\n{"event": "keys_reloaded", "level": "info"}\x1b[2J\u2028'
"""Input of an attacker who wants to write log lines of his own."""


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
def test_whoever_logs_writes_one_object_a_line(capfd):
    configure_logging("json", "info")
    write_all_kinds()
    close_handler()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    refused, bad_value, warned, *faults = lines
    assert (refused["event"], refused["level"]) == ("refused", "info")
    assert (bad_value["event"], bad_value["logger"]) == (f"bad value {FORGED}", "a.library")
    assert FORGED in warned["event"]
    assert [line["event"] for line in faults] == ["their bug", *["uncaught_exception"] * 3]
    assert all(FORGED in line["exception"] for line in faults)


@pytest.mark.usefixtures("restored")
def test_on_a_console_nobody_moves_the_cursor_or_begins_a_line(capfd, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    configure_logging("console", "info")
    write_all_kinds()
    close_handler()
    text = capfd.readouterr().err
    assert "\x1b[2J" not in text
    assert "\u2028" not in text
    [bad_value] = [line for line in text.splitlines() if "bad value" in line]
    assert "keys_reloaded" in bad_value


def test_grpc_writes_no_lines_of_its_own():
    """gRPC's core would, for example if a client does not speak TLS. It reads the variable when it is imported."""
    code = "import os; import safelight_server.cli.main; print(os.environ['GRPC_VERBOSITY'])"
    env = {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python", "PATH": "/usr/bin"}
    for given, there in (({}, "NONE"), ({"GRPC_VERBOSITY": "INFO"}, "INFO")):
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env | given, check=True)
        assert done.stdout.decode().strip() == there
