"""Jaeger all-in-one for tests: takes OTLP, answers queries, keeps traces in memory.

with jaeger() as traces:
    ...                                   # export to traces.otlp_grpc or traces.otlp_http
    await eventually(lambda: len(traces.spans(trace_id)) == 9)
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from load_tests.ports import free_ports
from tests.triton.support import ROOT

PROGRAM = ROOT / "tools" / "jaeger"
READY_S = 30.0


@dataclass(frozen=True)
class Jaeger:
    """Attributes:
    query_url: URL of its page and its query API.
    otlp_grpc: host:port that accepts OTLP over gRPC, without TLS.
    otlp_http: the full URL that accepts traces over HTTP, for Triton.
    """

    query_url: str
    otlp_grpc: str
    otlp_http: str

    def services(self) -> list[str]:
        """Names of the services that have sent spans."""
        return self._ask("/api/services") or []

    def trace(self, trace_id: str) -> dict[str, Any] | None:
        """One trace as Jaeger's query API returns it (spans, processes); None while Jaeger has no span of it."""
        try:
            found: list[dict[str, Any]] = self._ask(f"/api/traces/{trace_id}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return found[0]

    def spans(self, trace_id: str) -> list[dict[str, Any]]:
        """The spans of a trace; an empty list while none has come."""
        trace = self.trace(trace_id)
        return trace["spans"] if trace else []

    def count(self, service: str) -> int:
        """Number of traces that have spans of a service."""
        return len(self._ask(f"/api/traces?service={service}&limit=1000"))

    def _ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.query_url + path, timeout=5) as answer:
            return json.load(answer)["data"]


@contextmanager
def jaeger() -> Iterator[Jaeger]:
    """Runs Jaeger on free ports during the block; yields it once it accepts spans and queries."""
    query, grpc, http = free_ports(3)
    made = Jaeger(f"http://127.0.0.1:{query}", f"127.0.0.1:{grpc}", f"http://127.0.0.1:{http}/v1/traces")
    if not (ROOT / ".tools" / "all-in-one").exists():
        raise RuntimeError("Jaeger is not built: run `make tools`, or the tests with `make test-tools`")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([PROGRAM, str(query), str(grpc), str(http)], stdout=log, stderr=log)
        try:
            _wait_ready(made, process, log)
            yield made
        finally:
            process.kill()  # it keeps nothing, and takes long to end by itself
            process.wait(10)


def _wait_ready(made: Jaeger, process: subprocess.Popen[bytes], log: Any) -> None:
    until = time.monotonic() + READY_S
    while True:
        try:
            made.services()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                raise RuntimeError(f"Jaeger is not ready:\n{log.read()[-2000:]}") from None
            time.sleep(0.02)
