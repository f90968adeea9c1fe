"""Real Triton servers for tests: started by the project's supervisor, killed, frozen and restarted.

with triton_server() as triton:            # ready when the block begins
    client = InferenceServerClient(triton.grpc_url)
    triton.kill()                          # as kill -9 does
    triton.restart()                       # the same ports; ready some seconds later
    await eventually(triton.ready)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from load_tests.ports import free_ports

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv-triton" / "bin" / "python"
SERVE = ROOT / "deploy" / "triton" / "serve"
REPOSITORY = ROOT / "models" / "repository"
START_S = 25.0
"""Seconds after which the supervisor ends a start and tries again."""
READY_S = 80.0


class TritonServer:
    """One server, whose ports stay the same over restarts.

    Attributes:
        grpc_url: host:port, for tritonclient.
        http_url: URL with its scheme.
        arguments: arguments of `deploy/triton/serve`, beside the ports.
    """

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.grpc_port, self.http_port = free_ports(2)
        self.grpc_url = f"127.0.0.1:{self.grpc_port}"
        self.http_url = f"http://127.0.0.1:{self.http_port}"
        self.arguments = [str(argument) for argument in arguments]
        self._pid_file = folder / "pid"
        self._log = folder / "log"
        self._supervisor: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the supervisor and returns at once; see `ready`."""
        if not PYTHON.exists():
            raise RuntimeError("Triton is not installed: run the tests with `make test-triton`")
        command: list[str | Path] = [
            PYTHON,
            SERVE,
            "--grpc-port",
            str(self.grpc_port),
            "--http-port",
            str(self.http_port),
        ]
        command += ["--start-timeout", str(START_S)]
        with self._log.open("ab") as log:
            command += ["--pid-file", self._pid_file, *self.arguments]
            self._supervisor = subprocess.Popen(command, stdout=log, stderr=log)

    def ready(self) -> bool:
        """Whether the server reports that it and all its models are ready."""
        try:
            with urllib.request.urlopen(f"{self.http_url}/v2/health/ready", timeout=1):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def wait_ready(self) -> None:
        """Blocks until `ready`; raises an error with its log if it ends instead."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            if self.ready():
                return
            if self._supervisor is None or self._supervisor.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"Triton is not ready:\n{self.log()[-4000:]}")

    @property
    def started(self) -> bool:
        """Whether the supervisor has started tritonserver."""
        return self._pid_file.exists() and bool(self._pid_file.read_text())

    @property
    def pid(self) -> int:
        """Process id of tritonserver itself."""
        return int(self._pid_file.read_text())

    @property
    def supervisor(self) -> subprocess.Popen[bytes]:
        """The process of `deploy/triton/serve`."""
        assert self._supervisor is not None
        return self._supervisor

    def stubs(self) -> list[int]:
        """Process ids of the Python backend's stubs."""
        found = list[int]()
        for children in Path(f"/proc/{self.pid}/task").glob("*/children"):  # other threads load models
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
                found += map(int, children.read_text().split())
        return sorted(found)

    def stubs_of(self, model: str) -> list[int]:
        """Process ids of one model's stubs."""
        found = []
        for pid in self.stubs():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"python_backend_stub\0" in command and f"/{model}/".encode() in command:
                    found.append(pid)
        return found

    def shared_memory(self) -> list[Path]:
        """The server's own shared memory regions, without those of its clients."""
        return list(Path("/dev/shm").glob(f"safelight_triton_{self.grpc_port}_*"))

    def log(self) -> str:
        """The server's log."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """Kills the server and waits until the supervisor has cleaned up and ended (with --restart: has noticed)."""
        os.kill(self.pid, signal.SIGKILL)
        if "--restart" not in self.arguments:
            self.supervisor.wait(10)

    def stop(self) -> None:
        """Freezes the server and its stubs with SIGSTOP; returns when all their threads have stopped."""
        for pid in (self.pid, *self.stubs()):
            os.kill(pid, signal.SIGSTOP)
            while any(_state(thread) not in ("T", "") for thread in Path(f"/proc/{pid}/task").iterdir()):
                time.sleep(0.001)

    def cont(self) -> None:
        """Continues a frozen server."""
        for pid in (*self.stubs(), self.pid):
            os.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        """Starts a server that was killed or closed, on the same ports; returns at once."""
        self.close()
        self.start()

    def close(self) -> None:
        """Ends the server, frozen or not."""
        if self._supervisor is None:
            return
        if self._supervisor.poll() is None:
            if self._pid_file.exists():
                self.cont()
            self._supervisor.terminate()
            try:
                self._supervisor.wait(20)
            except subprocess.TimeoutExpired:
                os.kill(self.pid, signal.SIGKILL)
                self._supervisor.wait(10)
        self._supervisor = None


def _state(process: Path) -> str:
    """The state of a process or thread; empty if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    return ""


@contextmanager
def triton_server(*arguments: str | Path, wait: bool = True) -> Iterator[TritonServer]:
    """Runs a server during the block; `arguments` go to `deploy/triton/serve`.

    Args:
        wait: whether the block begins when the server is ready; else it begins at once.
    """
    with tempfile.TemporaryDirectory(prefix="safelight-test-triton-") as folder:
        server = TritonServer(Path(folder), *arguments)
        server.start()
        try:
            if wait:
                server.wait_ready()
            yield server
        finally:
            server.close()


@contextmanager
def triton_servers(count: int, *arguments: str | Path) -> Iterator[list[TritonServer]]:
    """Runs several servers, started in parallel; the block begins when all are ready."""
    with ExitStack() as stack:
        servers = [stack.enter_context(triton_server(*arguments, wait=False)) for _ in range(count)]
        for server in servers:
            server.wait_ready()
        yield servers
