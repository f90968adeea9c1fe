"""moto's server, an imitation of AWS's services, as a process of its own: warnings in it are no errors of a test."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address=sys.argv[1], port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), sep=":", flush=True)
sys.stdin.read()
server.stop()
"""
"""The program of the server: it prints its address, and ends when its standard input is closed."""


@contextlib.contextmanager
def moto_server(host: str = "127.0.0.1", **environment: str) -> Iterator[str]:
    """Runs the server on an address during the block, with further variables in its environment. Its URL."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )
    assert server.stdin is not None and server.stdout is not None
    with server:
        try:
            yield f"http://{server.stdout.readline().strip()}"
        finally:
            server.stdin.close()  # it ends
