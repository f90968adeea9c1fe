"""Server-sent events compared with gRPC: the same pictures, three previews each, from one server to a Python client.

The server is real, on the simulated runtime with the sizes of Stable Diffusion 1.5; a probe notes when it has
serialized a preview. The request over gRPC is the one that the HTTP port makes of the JSON. By gRPC the client is the
client library; by HTTP it does what OpenAI's package does: it splits lines, reads JSON and decodes base64. Both have
one connection and ask for one picture after another.
"""

from __future__ import annotations

import base64
import json
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from unittest import mock

import httpx2
import numpy as np
import safelight
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
from load_tests.bench.processes import Child, Usage
from load_tests.bench.requests import PROMPT
from load_tests.bench.runner import Row, median_by

NUM_STEPS, NUM_PREVIEWS = 7, 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `num_pictures` by each way in each round.

    Attributes:
        step_ms: time of a simulated denoiser step: longer than a preview takes, so that hardly any is dropped.
    """

    num_pictures: int = 100
    step_ms: float = 20.0
    rounds: int = 5


def rows(plan: Plan) -> list[dict[str, float | int | str]]:
    """A row for each way, medians over rounds."""
    measured: list[Row] = []
    with processes.child(_serving, plan.step_ms) as server, processes.child(processes.obey) as client:
        grpc_address, http_address = server.first()
        client.first()
        for turn in range(plan.rounds + 1):  # the first warms up
            ways = [("gRPC", by_grpc, grpc_address), ("server-sent events", by_http, http_address)]
            for number, (way, ask, address) in enumerate(ways if turn % 2 else ways[::-1]):
                seeds = range((2 * turn + number) * plan.num_pictures, (2 * turn + number + 1) * plan.num_pictures)
                row = _row(way, server, client, ask, address, seeds)
                measured += [row] if turn else []
    return median_by(measured, ("way",))


def _row(way: str, server: Child, client: Child, ask: object, address: str, seeds: range) -> Row:
    server.ask()
    before: Usage = client.ask(processes.usage)
    began = time.perf_counter()
    received_us, num_bytes = client.ask(ask, address, seeds)
    wall_s = time.perf_counter() - began
    after: Usage = client.ask(processes.usage)
    cpu_s, written_us = server.ask()
    if len(written_us) != len(received_us):
        raise RuntimeError(f"{way}: {len(received_us)} of {len(written_us)} previews")
    late_ms = (np.array(received_us) - np.array(written_us)) / 1e3
    return {
        "way": way,
        "pictures_per_s": len(seeds) / wall_s,
        "previews_a_picture": len(received_us) / len(seeds),
        "kib_a_preview": num_bytes / len(received_us) / 1024,
        "server_cpu_ms_a_picture": 1e3 * cpu_s / len(seeds),
        "client_cpu_ms_a_picture": 1e3 * (after.cpu_s - before.cpu_s) / len(seeds),
        "late_ms_p50": float(np.percentile(late_ms, 50)),
        "late_ms_p99": float(np.percentile(late_ms, 99)),
    }


def _body(seed: int) -> bytes:
    asked = {"prompt": PROMPT, "stream": True, "partial_images": NUM_PREVIEWS, "output_format": "jpeg"}
    return json.dumps(asked | {"num_inference_steps": NUM_STEPS, "seed": seed}).encode()


async def by_grpc(address: str, seeds: range) -> tuple[list[int], int]:
    """Requests the pictures; returns each preview's arrival, in microseconds since 1970, and the bytes of the files."""
    catalog = Catalog([simulated.simulated_pipeline()])
    received_us: list[int] = []
    num_bytes = 0
    async with safelight.Client(address) as client:
        for seed in seeds:
            request, _ = generate_request(parse(_body(seed)), catalog)
            async for event in client.develop(request):
                if isinstance(event, safelight.Preview):
                    received_us.append(time.time_ns() // 1000)
                    num_bytes += len(event.data)
    return received_us, num_bytes


async def by_http(address: str, seeds: range) -> tuple[list[int], int]:
    """As `by_grpc`, by the HTTP port."""
    received_us: list[int] = []
    num_bytes = 0
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
                        data = base64.b64decode(json.loads(line.removeprefix("data: "))["b64_json"])
                        if kind == partial:
                            received_us.append(time.time_ns() // 1000)
                            num_bytes += len(data)
    return received_us, num_bytes


async def _serving(pipe: Connection, step_ms: float) -> None:
    """Says both addresses; answers with its CPU seconds and the times of the previews since the question before."""
    configure_logging("json", "error")
    for name, value in loop.SD15.items():  # of this process only
        setattr(simulated, name, value)
    written_us: list[int] = []

    def noted(generation: str, output_index: int, rendered: RenderedPreview, num_dropped: int) -> bytes:
        data = serialization.preview(generation, output_index, rendered, num_dropped)
        written_us.append(time.time_ns() // 1000)
        return data

    settings = load(
        port=0, http_port=_free_port(), runtime="simulated", simulated_base_ms=step_ms, simulated_row_ms=0.0,
        num_instances=1, log_level="error",
    )  # fmt: skip
    with mock.patch.object(watcher, "preview", noted):
        async with serving(settings) as running:
            settle()
            pipe.send((running.address, running.http_address))
            before = (await processes.usage()).cpu_s

            async def since() -> tuple[float, list[int]]:
                nonlocal before
                after = (await processes.usage()).cpu_s
                answer = after - before, written_us.copy()
                before = after
                written_us.clear()
                return answer

            await processes.answer(pipe, since)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
