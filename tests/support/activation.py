"""An activator in this process, and replicas whose answers a test decides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry
from safelight_server.activator.connector import Connector
from safelight_server.activator.fleet import Fleet
from safelight_server.activator.grpc_calls import GrpcForwarder
from safelight_server.activator.http_app import build_activator_app
from safelight_server.activator.http_calls import HttpForwarder, WholeBodyReader
from safelight_server.activator.replicas import ConnectedReplicas
from safelight_server.activator.waiting_room import WaitingRoom
from safelight_server.api.call_limits import CallLimits, KeylessQuota
from safelight_server.api.identity import Identity
from safelight_server.api.images import UploadRoom
from safelight_server.app.grpc_server import make_server
from safelight_server.http.calls import Calls
from safelight_server.http.server import HttpLimits, HttpServer, bind
from safelight_server.settings import Settings
from safelight_server.telemetry import Metrics

HELD = "safelight_held_calls"
LIST_MODELS = "/safelight.v1.ModelService/ListModels"


@dataclass
class Names:
    """Fake DNS answers."""

    addresses: frozenset[str] = frozenset()
    is_away: bool = False

    async def resolve(self) -> frozenset[str]:
        if self.is_away:
            raise OSError("DNS is away")
        return self.addresses


@dataclass
class Activation:
    """A listening activator and its parts."""

    address: str
    http_address: str
    names: Names
    fleet: Fleet
    replicas: ConnectedReplicas
    room: WaitingRoom
    held: Callable[[], float]

    async def has(self, *addresses: str) -> None:
        """Names these replicas, and waits until all of them take calls."""
        self.names.addresses = frozenset(addresses)
        while self.replicas.ready_addresses != self.names.addresses:  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def activation(
    key_file: Path | None = None,
    *,
    max_held: int = 10,
    hold_s: float = 60.0,
    http_port: int = 0,
    connector: Connector | None = None,
    **app: Any,
) -> AsyncIterator[Activation]:
    """An activator without TLS of its own.

    Args:
        http_port: that of its replicas.
        connector: connects to them; None: without TLS.
        app: arguments of `build_activator_app`.
    """
    names, metrics, registry = Names(), Metrics(), CollectorRegistry()
    fleet, identity = Fleet(names.resolve, 0.01), Identity(key_file)
    connector = connector or Connector(http_port=http_port)
    replicas = ConnectedReplicas(fleet, connector, 0.01)
    room = WaitingRoom(replicas, max_held=max_held, hold_s=hold_s, registry=registry)
    limits = CallLimits(10.0, (), KeylessQuota(1, 1), metrics)
    server = make_server(Settings(), limits, GrpcForwarder(room, identity).handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = {"cors_origins": (), "only_loopback": key_file is None} | app
    forms = WholeBodyReader(UploadRoom(1 << 20), 1 << 20)
    forward, calls = HttpForwarder(room, connector), Calls(identity, metrics, 1 << 17)
    built = build_activator_app(forward, calls, forms, lambda: True, **options)
    http = await HttpServer.start(built, bind("127.0.0.1", 0), HttpLimits(100, 30.0), None)
    following = [asyncio.create_task(work()) for work in (fleet.follow, replicas.follow, *connector.works)]
    try:
        held = lambda: registry.get_sample_value(HELD) or 0.0  # noqa: E731
        yield Activation(f"127.0.0.1:{port}", http.address, names, fleet, replicas, room, held)
    finally:
        await http.stop(0.0)
        await server.stop(None)
        for task in following:
            task.cancel()
        await replicas.close()


Answer = Callable[["GrpcReplica", Any], Awaitable[bytes]]


@dataclass
class GrpcReplica:
    """A gRPC server without health, whose answers to ListModels are those of a function.

    Attributes:
        num_calls: calls that have come.
    """

    address: str
    num_calls: int = 0


@asynccontextmanager
async def grpc_replica(answer: Answer, host: str = "127.0.0.1") -> AsyncIterator[GrpcReplica]:
    """Serves such a replica while the block runs."""
    server = grpc.aio.server()
    replica = GrpcReplica(f"{host}:{server.add_insecure_port(f'{host}:0')}")

    async def handle(_request: bytes, context: Any) -> bytes:
        replica.num_calls += 1
        return await answer(replica, context)

    service, _, method = LIST_MODELS[1:].partition("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(handle)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    await server.start()
    try:
        yield replica
    finally:
        await server.stop(None)


async def its_address(replica: GrpcReplica, _context: Any) -> bytes:
    """An answer: the address of the replica."""
    return replica.address.encode()


@asynccontextmanager
async def calling(address: str) -> AsyncIterator[Any]:
    """ListModels as bytes, so that no client retries."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel.unary_unary(LIST_MODELS)


Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class HttpReplica:
    """A replica whose HTTP is a function that reads and writes bytes, once for each connection.

    Attributes:
        address: of its gRPC, which only connects.
        http_port: of its HTTP.
        heads: what has come before the bodies of requests.
    """

    address: str
    http_port: int
    heads: list[bytes] = field(default_factory=list)
    connections: list[asyncio.StreamWriter] = field(default_factory=list)


@asynccontextmanager
async def http_replica(handle: Handle, port: int, host: str = "127.0.0.1") -> AsyncIterator[HttpReplica]:
    """Serves such a replica on a port of HTTP while the block runs."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if ended.is_set():
            writer.transport.abort()
            return
        replica.connections.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            replica.heads.append(await reader.readuntil(b"\r\n\r\n"))
            await handle(reader, writer)
            writer.close()
            await writer.wait_closed()

    ended = asyncio.Event()
    async with grpc_replica(its_address, host) as behind:
        replica = HttpReplica(behind.address, port)
        server = await asyncio.start_server(connected, host, port)
        try:
            yield replica
        finally:
            server.close()
            ended.set()
            for writer in replica.connections:
                writer.transport.abort()
            for _ in range(5):  # turns in which what was accepted just before is served, and so ended
                await asyncio.sleep(0)
