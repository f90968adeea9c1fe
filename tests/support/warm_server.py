"""Starts `safelight serve` as forks of a process that has imported the server, since imports take most of a start.

Each server is a process of its own: it runs the command line in its environment, writes to its log, and reacts to
signals. Servers that still run when the tests end are killed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


class ServerProcess:
    """A server in a process of its own, whose output is appended to `log`."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.pid = _ask({"environment": dict(environment), "log": str(log)})
        self._returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Waits for its end and returns its exit status, which is negative if a signal ended it."""
        if self._returncode is None:
            self._returncode = _ask({"wait": self.pid})
        return self._returncode

    def kill(self) -> None:
        """Kills it and waits for its end. Does nothing if `wait` has returned."""
        if self._returncode is None:
            self.send_signal(signal.SIGKILL)
            self.wait()


@functools.cache
def _imported() -> subprocess.Popen[str]:
    """The process that has imported the server. It ends when its input is closed, at the latest with this process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAFELIGHT_")}
    path = os.pathsep.join(map(str, (ROOT / "server", ROOT / "clients/python", ROOT)))
    command = [sys.executable, "-m", "tests.support.warm_server"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment | {"PYTHONPATH": path}, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


_one_at_a_time = threading.Lock()


def _ask(order: Mapping[str, Any]) -> int:
    with _one_at_a_time:
        process = _imported()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())


def main() -> None:
    """Imports the server, then forks for each command; the fork returns from `_forked` and serves."""
    import safelight_server.app.process  # noqa: F401  # what `serve` would import in each fork
    from safelight_server.cli.main import main as command

    gc.freeze()
    if _forked():
        command()


def _forked() -> bool:
    """Runs commands until the input ends. Returns whether this process is a fork, which has to serve."""
    running = set()
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if (pid := order.get("wait")) is not None:
            _, status = os.waitpid(pid, 0)
            running.discard(pid)
            print(os.waitstatus_to_exitcode(status), flush=True)
        else:
            pid = os.fork()
            if not pid:
                _become(**order)
                return True
            running.add(pid)
            print(pid, flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return False


def _become(environment: Mapping[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = ["serve"]
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, standard in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(ours, standard)
        os.set_inheritable(standard, True)


if __name__ == "__main__":
    main()
