"""Ports of loopback for servers whose port must be known before they start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
from pathlib import Path

PORTS = range(20_000, 32_000)
"""Below those that Linux gives to outgoing connections (`net.ipv4.ip_local_port_range`, from 32,768 on). A port of
theirs, found free, can be taken by any connection of the machine before the server listens on it."""

LOCKS = Path("/tmp", f"safelight-ports-{os.getuid()}")
"""One file for all processes of a user: each run of the tests has a temporary folder of its own (tests/conftest.py)."""

_given: set[int] = set()
_locks: list[int] = []


def free_port() -> int:
    """A port on which nobody listens, and which no other process is given here while this one lives."""
    if not _locks:
        _locks.append(os.open(LOCKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):  # forks of one process must not draw the same ones
        if port in _given:
            continue
        with contextlib.suppress(OSError):
            # A record lock of one byte: it ends with the process, and a fork does not have it.
            fcntl.lockf(_locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            socket.create_server(("127.0.0.1", port)).close()
            _given.add(port)
            return port
    raise RuntimeError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")


def free_ports(count: int) -> list[int]:
    """So many different ports, each as by `free_port`."""
    return [free_port() for _ in range(count)]
