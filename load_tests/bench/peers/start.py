"""Starts a peer as a separate program in its own session, so that all its workers end with it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from load_tests.ports import free_port

STARTS_S = 300.0
HEALTH_OK = 200
SERVING = "serving "
"""What a peer prints before the address that it listens on."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A running peer. It is stopped (SIGSTOP) except while `awake`, since an idle peer uses CPU, too."""

    address: str
    pid: int

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Lets it run during the block."""
        os.killpg(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGSTOP)


class PeerError(Exception):
    """A peer did not start; the message has its output."""


@contextlib.contextmanager
def litserve(models: Path, num_workers: int, num_threads: int) -> Iterator[Peer]:
    """Starts a LitServe server with so many workers, of so many threads each."""
    port = free_port()
    options = [
        "--port",
        str(port),
        "--models",
        str(models),
        "--workers",
        str(num_workers),
        "--threads",
        str(num_threads),
    ]
    with _program("load_tests.bench.peers.litserve_server", options) as process:
        _until_healthy(process, f"http://127.0.0.1:{port}/health")
        yield _paused(process, f"127.0.0.1:{port}")


@contextlib.contextmanager
def diffusers() -> Iterator[Peer]:
    """Starts the plain server around diffusers."""
    with _program("load_tests.bench.peers.diffusers_server", []) as process:
        yield _paused(process, _address(process))


@contextlib.contextmanager
def _program(module: str, options: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *options],
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _paused(process: subprocess.Popen[bytes], address: str) -> Peer:
    os.killpg(process.pid, signal.SIGSTOP)
    return Peer(address, process.pid)


def _address(process: subprocess.Popen[bytes]) -> str:
    """Reads the address that the peer prints; libraries may print other lines before."""
    if process.stdout is None:
        raise PeerError(f"{process.args!r} has no pipe")
    until = time.monotonic() + STARTS_S
    while select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
        line = process.stdout.readline().decode()
        if line.startswith(SERVING):
            return line.removeprefix(SERVING).strip()
        if not line:
            raise PeerError(f"{process.args!r} ended before it was serving")
    raise PeerError(f"{process.args!r} was not serving after {STARTS_S:.0f} s")


def _until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + STARTS_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise PeerError(f"{process.args!r} ended with {process.returncode}")
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(url, timeout=5) as answer,
        ):
            if answer.status == HEALTH_OK:
                return
        time.sleep(0.2)
    raise PeerError(f"{process.args!r} was not healthy after {STARTS_S:.0f} s")
