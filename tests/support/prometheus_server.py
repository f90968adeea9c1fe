"""A real Prometheus that a test starts, and queries to it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
READY_S = 60.0


class PrometheusServer:
    """Queries a Prometheus on this machine.

    Attributes:
        url: URL of its API.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.url = f"http://{host}:{port}"

    def ready(self) -> bool:
        """Whether it answers queries."""
        try:
            with DIRECT.open(f"{self.url}/-/ready", timeout=2):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The samples of a query now; fails with Prometheus' message if the query is invalid."""
        return self._get("query", query=query)

    def over(self, query: str, begin: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """The series of a query from `begin` to `end`, Unix seconds."""
        return self._get("query_range", query=query, start=str(begin), end=str(end), step=str(step_s))

    def _get(self, call: str, **parameters: str) -> list[dict[str, Any]]:
        try:
            with DIRECT.open(f"{self.url}/api/v1/{call}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return found
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters['query']}: {json.load(error)['error']}") from None


@contextmanager
def prometheus(folder: Path, config: str, *options: str, host: str = "127.0.0.1") -> Iterator[PrometheusServer]:
    """Runs Prometheus with this configuration during the block; its data is in `folder`/data."""
    program = shutil.which("prometheus")
    assert program is not None, "no prometheus: tools/install-system-packages"
    (folder / "prometheus.yml").write_text(config)
    with socket.create_server((host, 0)) as listening:
        port = listening.getsockname()[1]
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={host}:{port}",
        "--storage.tsdb.retention.time=10y",
        *options,
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server, until = PrometheusServer(port, host), time.monotonic() + READY_S
        while not server.ready():
            assert process.poll() is None and time.monotonic() < until, (folder / "prometheus.log").read_text()[-2000:]
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait(20)
