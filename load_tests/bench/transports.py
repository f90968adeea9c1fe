"""gRPC, gRPC-Web and server-sent events: the same pictures with three previews each, from one server.

The server is real, on the simulated runtime with the sizes of Stable Diffusion 1.5; a probe notes when it has
serialized a preview. The request over gRPC is the one that the HTTP port makes of its JSON. Over gRPC the clients are
the Python client library and the runner of the TypeScript client; over gRPC-Web, that runner with the client for pages
and Node's `fetch`. For server-sent events a Python client does what OpenAI's package does: it splits lines, parses JSON
and decodes base64. Each client has one connection and requests one picture after another.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import httpx2
import numpy as np
import safelight
from google.protobuf import json_format
from safelight.v1 import generation_pb2 as pb
from safelight_server.app.process import settle
from safelight_server.app.server import serving
from safelight_server.catalog.catalog import Catalog
from safelight_server.http.images_request import generate_request, parse
from safelight_server.preview import RenderedPreview
from safelight_server.runtime import simulated
from safelight_server.settings import load
from safelight_server.stream import serialization, watcher
from safelight_server.telemetry import configure_logging

from load_tests.bench import loop, processes
from load_tests.bench.processes import Child
from load_tests.bench.requests import PROMPT
from load_tests.bench.runner import Row, median_by
from load_tests.ports import free_port
from tools.clients import runners

NUM_STEPS, NUM_PREVIEWS = 7, 3
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
RUNNERS = {"gRPC, TypeScript": "typescript", "gRPC-Web, TypeScript": runners.WEB}
"""Ways whose client is a runner of clients/CONFORMANCE.md."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `num_pictures` by each way in each round.

    Attributes:
        step_ms: time of a simulated denoiser call; longer than that of a preview, so that hardly any is skipped.
        typescript: whether to measure the TypeScript client too, if Node is installed.
    """

    num_pictures: int = 40
    step_ms: float = 20.0
    rounds: int = 4
    typescript: bool = True


class Client(Protocol):
    """A process that requests pictures, one after another."""

    def cpu_s(self) -> float:
        """CPU seconds of the process so far, with all its threads."""

    def ask(self, seeds: range) -> list[int]:
        """Requests a picture of each seed; returns when each preview came, in microseconds since 1970."""


@dataclass(frozen=True, slots=True)
class PythonClient:
    """A process of this package that runs `by_grpc` or `by_http`."""

    child: Child
    by: object
    address: str

    def cpu_s(self) -> float:
        """See `Client`."""
        return float(self.child.ask(processes.usage).cpu_s)

    def ask(self, seeds: range) -> list[int]:
        """See `Client`."""
        received_us: list[int] = self.child.ask(self.by, self.address, seeds)
        return received_us


@dataclass(frozen=True, slots=True)
class RunnerClient:
    """A runner of clients/CONFORMANCE.md, which sends the given requests one after another."""

    process: subprocess.Popen[str]
    address: str

    def cpu_s(self) -> float:
        """See `Client`. The resolution is the system's clock tick, 10 ms."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def ask(self, seeds: range) -> list[int]:
        """See `Client`.

        Raises:
            RuntimeError: a generation has failed, or the runner has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        messages = [json_format.MessageToDict(request) for request in _requests(seeds)]
        print(json.dumps(runners.told("measure", [self.address], messages, measure=True)), file=self.process.stdin)
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} has ended with {self.process.wait()}")
        generations: list[dict[str, Any]] = json.loads(line)["generations"]
        if failed := next((one for one in generations if one["code"] != "OK"), None):
            raise RuntimeError(f"{self.process.args!r}: {failed['code']}: {failed['message']}")
        return [when for one in generations for when in one["received_us"]]


def rows(plan: Plan) -> list[dict[str, float | int | str]]:
    """Measures all ways; a row for each, with medians over rounds."""
    measured: list[Row] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(processes.child(_serving, plan.step_ms))
        grpc_address, http_address = server.first()
        ways = _clients(plan, grpc_address, http_address, stack)
        for turn in range(plan.rounds + 1):  # the first warms up
            for number, (way, client) in enumerate(ways if turn % 2 else ways[::-1]):
                first = (len(ways) * turn + number) * plan.num_pictures
                row = _row(way, server, client, range(first, first + plan.num_pictures))
                measured += [row] if turn else []
    return median_by(measured, ("way",))


def _clients(plan: Plan, grpc_address: str, http_address: str, stack: contextlib.ExitStack) -> list[tuple[str, Client]]:
    child = stack.enter_context(processes.child(processes.obey))
    child.first()
    found: list[tuple[str, Client]] = [("gRPC, Python", PythonClient(child, by_grpc, grpc_address))]
    found.append(("server-sent events, Python", PythonClient(child, by_http, http_address)))
    for way, language in RUNNERS.items() if plan.typescript and runners.is_here("typescript") else ():
        process = stack.enter_context(_started(runners.runner(language, optimized=True)))
        found.append((way, RunnerClient(process, http_address if language == runners.WEB else grpc_address)))
    return found


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Starts a runner and ends it after the block."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _row(way: str, server: Child, client: Client, seeds: range) -> Row:
    server.ask()
    before_s = client.cpu_s()
    began = time.perf_counter()
    received_us = client.ask(seeds)
    wall_s = time.perf_counter() - began
    client_cpu_s = client.cpu_s() - before_s
    server_cpu_s, written_us, num_bytes = server.ask()
    if len(written_us) != len(received_us):
        raise RuntimeError(f"{way}: {len(received_us)} of {len(written_us)} previews")
    late_ms = (np.array(received_us) - np.array(written_us)) / 1e3
    return {
        "way": way,
        "pictures_per_s": len(seeds) / wall_s,
        "previews_a_picture": len(received_us) / len(seeds),
        "kib_a_preview": num_bytes / len(received_us) / 1024,
        "server_cpu_ms_a_preview": 1e3 * server_cpu_s / len(received_us),
        "client_cpu_ms_a_preview": 1e3 * client_cpu_s / len(received_us),
        "late_ms_p50": float(np.percentile(late_ms, 50)),
        "late_ms_p99": float(np.percentile(late_ms, 99)),
    }


def _body(seed: int) -> bytes:
    asked = {"prompt": PROMPT, "stream": True, "partial_images": NUM_PREVIEWS, "output_format": "jpeg"}
    return json.dumps(asked | {"num_inference_steps": NUM_STEPS, "seed": seed}).encode()


def _requests(seeds: range) -> list[pb.GenerateRequest]:
    """The requests that the HTTP port makes of the JSON of each seed."""
    catalog = Catalog([simulated.simulated_pipeline()])
    return [generate_request(parse(_body(seed)), catalog)[0] for seed in seeds]


async def by_grpc(address: str, seeds: range) -> list[int]:
    """Requests the pictures over gRPC; returns when each preview came, in microseconds since 1970."""
    requests = _requests(seeds)
    received_us: list[int] = []
    async with safelight.Client(address) as client:
        for request in requests:
            async for event in client.develop(request):
                if isinstance(event, safelight.Preview):
                    received_us.append(time.time_ns() // 1000)
    return received_us


async def by_http(address: str, seeds: range) -> list[int]:
    """As `by_grpc`, but over the HTTP port."""
    received_us: list[int] = []
    headers, partial = {"content-type": "application/json"}, "event: image_generation.partial_image"
    async with httpx2.AsyncClient(base_url=f"http://{address}", headers=headers, trust_env=False) as client:
        for seed in seeds:
            async with client.stream("POST", "/v1/images/generations", content=_body(seed)) as response:
                response.raise_for_status()
                kind = ""
                async for line in response.aiter_lines():
                    if line.startswith("event: "):
                        kind = line
                    elif line.startswith("data: "):
                        base64.b64decode(json.loads(line.removeprefix("data: "))["b64_json"])
                        if kind == partial:
                            received_us.append(time.time_ns() // 1000)
    return received_us


async def _serving(pipe: Connection, step_ms: float) -> None:
    """Sends both addresses; answers with its CPU seconds and the previews' times and bytes since the last question."""
    configure_logging("json", "error")
    for name, value in loop.SD15.items():  # of this process only
        setattr(simulated, name, value)
    written_us: list[int] = []
    num_bytes = 0

    def noted(generation: str, output_index: int, rendered: RenderedPreview, num_dropped: int) -> bytes:
        nonlocal num_bytes
        data = serialization.preview(generation, output_index, rendered, num_dropped)
        written_us.append(time.time_ns() // 1000)
        num_bytes += len(data)
        return data

    settings = load(
        port=0, http_port=free_port(), runtime="simulated", simulated_base_ms=step_ms, simulated_row_ms=0.0,
        num_instances=1, log_level="error",
    )  # fmt: skip
    with mock.patch.object(watcher, "preview", noted):
        async with serving(settings) as running:
            settle()
            pipe.send((running.address, running.http_address))
            before = (await processes.usage()).cpu_s

            async def since() -> tuple[float, list[int], int]:
                nonlocal before, num_bytes
                after = (await processes.usage()).cpu_s
                answer = after - before, written_us.copy(), num_bytes
                before, num_bytes = after, 0
                written_us.clear()
                return answer

            await processes.answer(pipe, since)
