"""Log lines: what becomes of them where they cannot be written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
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
def restored():
    """The configuration of structlog is after the test as it was before."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


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
