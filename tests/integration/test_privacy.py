"""A running server reports nothing to anyone: it writes no file to the home folder and resolves no name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WATCHED_S = {"onnx": 12.0, "simulated": 2.0}
"""Seconds to watch, by runtime. ONNX Runtime resolved its collector 9 s after the first session was made."""


@pytest.mark.parametrize("runtime", ["onnx", "simulated"])
def test_a_server_writes_no_file_and_looks_no_name_up(runtime, tmp_path):
    home, network, output = tmp_path / "home", tmp_path / "network", tmp_path / "output"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SAFELIGHT", "XDG")) and "TELEMETRY" not in k}
    code = "from safelight_server.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--runtime", runtime]
    strace = shutil.which("strace")  # tools/install-system-packages installs it; without it only files are checked
    if strace:
        # --seccomp-bpf: only network calls stop, so that the server starts about as quickly as without.
        command = [strace, "-D", "-f", "-qq", "--seccomp-bpf", "-e", "trace=network", "-o", str(network), *command]
    with output.open("wb") as sink:
        server = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
            env=kept | {"HOME": str(home), "PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'clients/python'}"},
        )
        try:
            deadline = time.monotonic() + 40
            while b"listens on" not in output.read_bytes():
                assert server.poll() is None and time.monotonic() < deadline, output.read_text()
                time.sleep(0.05)
            time.sleep(WATCHED_S[runtime])  # there is no event to wait for: the rule is that nothing happens
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0, output.read_text()
    calls = network.read_text() if strace else "listen("
    assert "listen(" in calls  # strace has traced the server
    files = [file for file in home.rglob("*") if file.is_file()]
    assert (files, [line for line in calls.splitlines() if "htons(53)" in line]) == ([], [])
