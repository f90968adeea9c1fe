"""The process of a language's runner, which runs one case after another."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

BOUND_S = 100.0
"""Seconds after which a runner counts as hanging: every case ends by itself in a third of this."""
ENDS_S = 30.0
"""Seconds within which a runner must end after its last case."""
DEAD_PROXY = "http://127.0.0.1:9"
"""A proxy on which nothing listens: a client that uses it for servers on this machine fails every case."""
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "grpc_proxy"), DEAD_PROXY)


class Runner:
    """Starts the process for the first case, and again after a case that it did not end.

    Most runners take longer to start than for a case. Each has its own thread that waits for its output, since the
    servers in this process need the threads of asyncio's default executor.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process runs
        self._thread = ThreadPoolExecutor(1)

    async def run(self, told: dict[str, Any]) -> dict[str, Any]:
        """Runs a case and returns what the runner prints, within `BOUND_S`.

        Raises:
            AssertionError: the runner hangs, or has ended.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, told)

    def _run(self, told: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=self._complaints, env=os.environ | PROXIES
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        hangs = threading.Timer(BOUND_S, process.kill)
        hangs.start()
        try:
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()
            printed = process.stdout.readline()
        except BrokenPipeError:
            printed = b""
        finally:
            hangs.cancel()
        if not printed.endswith(b"\n"):
            self._process = None
            process.kill()
            process.wait()
            raise AssertionError(f"{told['name']}: the runner hangs or has ended\n{self._said()}")
        report: dict[str, Any] = json.loads(printed)
        return report

    def close(self) -> None:
        """Closes the runner's input; it must then end by itself.

        Raises:
            AssertionError: the runner has failed, or has not ended in time.
        """
        with self._complaints, self._thread:
            if self._process is None:
                return
            try:
                printed, _ = self._process.communicate(timeout=ENDS_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
                raise AssertionError(f"{self._command} does not end after its last case\n{self._said()}") from None
            assert (self._process.returncode, printed) == (0, b""), self._said()

    def _said(self) -> str:
        self._complaints.seek(0)
        return self._complaints.read().decode(errors="replace")[-8000:]
