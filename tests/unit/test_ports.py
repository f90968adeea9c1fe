"""Ports for tests: a port is given to only one process while that lives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from load_tests import ports

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def given(monkeypatch) -> int:
    """A port that this process has, made the only candidate."""
    port = ports.free_port()
    monkeypatch.setattr(ports, "PORTS", range(port, port + 1))
    return port


def test_no_port_is_given_twice(given):
    with pytest.raises(RuntimeError, match=f"no port from {given} to {given} is free"):
        ports.free_port()


def test_another_process_is_not_given_what_this_one_has(given, tmp_path):
    """Neither in the temporary folder of another run of the tests."""
    code = f"from load_tests import ports; ports.PORTS = range({given}, {given + 1}); ports.free_port()"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "is free" in ended.stderr


def test_a_port_on_which_somebody_listens_is_not_given(given, monkeypatch):
    with socket.create_server(("127.0.0.1", given)):
        monkeypatch.setattr(ports, "_given", set())
        with pytest.raises(RuntimeError, match="is free"):
            ports.free_port()
