"""A server with HTTP on a free port, a client for it, requests that tests write byte by byte, and adapters for it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safelight_server.app import server
from safelight_server.app.server import Running
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.manifest import ADAPTER_INPUTS, STABLE_DIFFUSION_INPUTS, AdapterRoom
from safelight_server.catalog.pipeline import assemble
from safelight_server.runtime.base import Runtime
from safelight_server.runtime.simulated import simulated_pipeline
from safelight_server.settings import Settings

from load_tests.ports import free_port
from tests.conftest import serving_here
from tests.support.adapters import ROOM, write_adapter

GENERATIONS = "/v1/images/generations"
SIMULATED = {"runtime": "simulated", "num_instances": 1, "simulated_base_ms": 3.0, "simulated_row_ms": 0.0}


@asynccontextmanager
async def http_server(**settings: object) -> AsyncIterator[Running]:
    """Runs a server with HTTP and the simulated runtime in this process; settings are keyword arguments."""
    async with serving_here(**SIMULATED | {"http_port": free_port()} | settings) as running:
        yield running


def client(running: Running, **options: Any) -> httpx2.AsyncClient:
    """A client of the server's HTTP port."""
    return httpx2.AsyncClient(base_url=f"http://{running.http_address}", trust_env=False, timeout=30, **options)


def body(**parameters: object) -> dict[str, object]:
    """The JSON body of a request for a short generation."""
    return {"prompt": "a red potion", "num_inference_steps": 4} | parameters


def server_sent(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parses the server-sent events of a stream: (name, JSON) each."""
    events = []
    for block in text.strip().split("\n\n"):
        if block == ":":
            continue  # a comment
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


@asynccontextmanager
async def raw_connection(
    running: Running, receive_bytes: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Opens a connection whose bytes the test reads and writes; `receive_bytes` bounds the kernel's receive buffer."""
    host, port = running.http_address.rsplit(":", 1)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    except OSError:
        connection.close()
        raise
    reader, writer = await asyncio.open_connection(sock=connection, limit=receive_bytes or 1 << 16)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def post(running: Running, parameters: dict[str, object]) -> bytes:
    """The bytes of an HTTP request for pictures."""
    data = json.dumps(parameters).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: {running.http_address}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def simulate_adapters(monkeypatch: pytest.MonkeyPatch, folder: Path, *adapters: str) -> None:
    """Lets the model of simulated servers that start from now on take adapters; it has these, of rank 2, in `folder`."""
    room, plain, build = AdapterRoom.model_validate(ROOM), simulated_pipeline(), server.build_runtime
    manifest = plain.manifest.model_copy(update={"adapters": room, "inputs": STABLE_DIFFUSION_INPUTS | ADAPTER_INPUTS})
    for seed, name in enumerate(adapters):
        write_adapter(folder, name, seed=seed)

    def built(settings: Settings) -> tuple[Catalog, Runtime]:
        catalog, runtime = build(settings)
        catalog.adapters = AdapterLibrary(folder, {plain.name: room})
        return catalog, runtime

    monkeypatch.setattr(server, "simulated_pipeline", lambda: assemble(manifest, {}, plain.tokenizer))
    monkeypatch.setattr(server, "build_runtime", built)
