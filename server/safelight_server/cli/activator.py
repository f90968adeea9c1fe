"""`safelight activator`: holds the calls of a fleet that has scaled to zero, and forwards them."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import structlog
import typer
import uvloop
from grpc_health.v1 import health_pb2

from safelight_server import settings as settings_module
from safelight_server.activator.connector import Connector
from safelight_server.activator.fleet import Fleet, by_dns
from safelight_server.activator.grpc_calls import SERVICES, GrpcForwarder
from safelight_server.activator.http_app import build_activator_app
from safelight_server.activator.http_calls import HttpForwarder, WholeBodyReader
from safelight_server.activator.replicas import ConnectedReplicas
from safelight_server.activator.waiting_room import WaitingRoom
from safelight_server.api.call_limits import CallLimits, KeylessQuota
from safelight_server.api.health import HEALTH_SERVICE, Health
from safelight_server.api.identity import Identity
from safelight_server.api.images import UploadRoom
from safelight_server.app.address import BindError, bind
from safelight_server.app.callers import build_identity
from safelight_server.app.certificate import CertificateError, ServerCertificate
from safelight_server.app.errors import StartError
from safelight_server.app.grpc_server import MAX_KEYLESS_STREAMS, make_server, probe_server
from safelight_server.app.http_server import max_body_bytes
from safelight_server.app.listening import serving_metrics
from safelight_server.files import ConfigFileError
from safelight_server.http.calls import Calls
from safelight_server.http.edits import NUM_FILES
from safelight_server.http.server import HttpLimits, HttpServer
from safelight_server.http.server import bind as bind_http
from safelight_server.settings import Settings, is_loopback
from safelight_server.telemetry import Metrics, configure_logging
from safelight_server.telemetry.background import keep_running

log = structlog.get_logger(__name__)
CONNECTION_AGE = (("grpc.max_connection_age_ms", 60_000),)
"""A client connects anew, and finds a replica, once it has had a connection here for a minute; calls go on."""


def activator(
    fleet: Annotated[str, typer.Option(help="HOST:PORT of the replicas: a name with the address of each ready one.")],
    ca_file: Annotated[
        Path | None, typer.Option(help="PEM of who signed the replicas' certificate: asks them by TLS.")
    ] = None,
    client_cert_file: Annotated[
        Path | None,
        typer.Option(help="PEM of a certificate and its key, for replicas that require one (tls_client_ca_file)."),
    ] = None,
    server_name: Annotated[str, typer.Option(help="In the replicas' certificate, if it is not --fleet's.")] = "",
    fleet_http_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of the replicas' HTTP; 0: it is http_port there too.")
    ] = 0,
    max_held: Annotated[int, typer.Option(min=1, max=100_000, help="Calls that wait for a replica at once.")] = 1000,
    hold_s: Annotated[
        float, typer.Option("--hold", min=1, max=86_400, help="Seconds that a call waits for a replica.")
    ] = 900.0,
) -> None:
    """Hold the calls of a fleet that has scaled to zero, and forward them to its first replica.

    Addresses, TLS, keys, metrics and limits of requests are the settings of `serve`. Give it those of the replicas.
    """
    settings = settings_module.load()
    configure_logging(settings.log_format, settings.log_level)
    host, _, port = fleet.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise typer.BadParameter(f"{fleet!r} is not HOST:PORT", param_hint="--fleet")
    name = host.strip("[]")
    try:
        connector = Connector(ca_file, client_cert_file, server_name or name, fleet_http_port or settings.http_port)
    except ConfigFileError as error:
        raise typer.BadParameter(str(error), param_hint="--ca-file / --client-cert-file") from None
    uvloop.run(_serve(settings, Fleet(by_dns(name, int(port))), connector, max_held, hold_s))


async def _serve(settings: Settings, fleet: Fleet, connector: Connector, max_held: int, hold_s: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics()
    identity = build_identity(settings)
    replicas = ConnectedReplicas(fleet, connector)
    room = WaitingRoom(replicas, max_held=max_held, hold_s=hold_s, registry=metrics.registry)
    keyless = KeylessQuota(MAX_KEYLESS_STREAMS, settings.max_keyless_streams_per_address)
    limits = CallLimits(settings.request_wait_s, (HEALTH_SERVICE,), keyless, metrics)
    health = Health()
    server = make_server(settings, limits, GrpcForwarder(room, identity).handlers() | health.handlers(), CONNECTION_AGE)
    try:
        certificate = None
        if settings.tls_cert_file is not None and settings.tls_key_file is not None:
            files = settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file
            certificate = ServerCertificate(*files)
        credentials = None if certificate is None else certificate.credentials()
        address = bind(server, settings.host, settings.port, credentials)
        probed = probe_server(settings, limits, health.handlers())
        http = await _http(settings, HttpForwarder(room, connector), identity, metrics, certificate, stop)
    except (BindError, CertificateError) as error:
        raise StartError(str(error)) from None
    servers = [server] if probed is None else [server, probed]
    works = [fleet.follow, replicas.follow, *connector.works, *identity.works]
    async with serving_metrics(metrics, settings):
        tasks = [asyncio.create_task(keep_running(work, repr(work))) for work in works]
        for each in servers:
            await each.start()
        health.set(("", HEALTH_SERVICE, *SERVICES), health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", address=address, http="" if http is None else http.address)
        await stop.wait()
        log.info("draining", held=room.num_held)
        health.drain()
        room.drain()
        health.end_watches()
        stopping = [each.stop(settings.drain_grace_s) for each in servers]
        if http is not None:
            stopping.append(http.stop(settings.drain_grace_s))
        await asyncio.gather(*stopping)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await replicas.close()


async def _http(
    settings: Settings,
    forward: HttpForwarder,
    identity: Identity,
    metrics: Metrics,
    certificate: ServerCertificate | None,
    stop: asyncio.Event,
) -> HttpServer | None:
    """Begins to serve HTTP; None without `http_port`.

    Raises:
        BindError: the port is in use, or the address is not this machine's.
        CertificateError: the certificate cannot be used any more.
    """
    if not settings.http_port:
        return None
    most = max_body_bytes(settings)
    app = build_activator_app(
        forward,
        Calls(identity, metrics, most),
        WholeBodyReader(UploadRoom(settings.max_image_bytes), NUM_FILES * settings.max_image_bytes + most),
        lambda: not stop.is_set(),
        cors_origins=settings.cors_origins,
        only_loopback=not settings.requires_credentials and is_loopback(settings.host),
    )
    tls = None if certificate is None else certificate.context()
    limits = HttpLimits(settings.http_max_connections, settings.watcher_stall_s)
    try:
        return await HttpServer.start(app, bind_http(settings.host, settings.http_port), limits, tls)
    except OSError as error:
        raise BindError(f"http_port {settings.http_port} of {settings.host}: {error.strerror}") from None
