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
from safelight_server.activator.activator import SERVICES, Activator, connector
from safelight_server.activator.fleet import Fleet, by_dns
from safelight_server.api.call_limits import CallLimits, KeylessQuota
from safelight_server.api.health import HEALTH_SERVICE, Health
from safelight_server.api.identity import Identity
from safelight_server.app.address import BindError, bind
from safelight_server.app.certificate import CertificateError, ServerCertificate
from safelight_server.app.grpc_server import make_server, probe_server
from safelight_server.app.server import MAX_KEYLESS_STREAMS, StartError, serving_metrics
from safelight_server.files import read_regular_file
from safelight_server.settings import Settings
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
    server_name: Annotated[str, typer.Option(help="In the replicas' certificate, if it is not --fleet's.")] = "",
    max_held: Annotated[int, typer.Option(min=1, max=100_000, help="Calls that wait for a replica at once.")] = 1000,
    hold_s: Annotated[
        float, typer.Option("--hold", min=1, max=86_400, help="Seconds that a call waits for a replica.")
    ] = 900.0,
) -> None:
    """Hold the calls of a fleet that has scaled to zero, and forward them to its first replica.

    Address, TLS, keys and metrics are the settings of `serve`.
    """
    settings = settings_module.load()
    configure_logging(settings.log_format, settings.log_level)
    host, _, port = fleet.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise typer.BadParameter(f"{fleet!r} is not HOST:PORT", param_hint="--fleet")
    try:
        ca = None if ca_file is None else read_regular_file(ca_file)
    except OSError as error:
        raise typer.BadParameter(f"{ca_file}: {error.strerror}", param_hint="--ca-file") from None
    replicas = Fleet(by_dns(host.strip("[]"), int(port)))
    uvloop.run(_serve(settings, replicas, ca, server_name or host, max_held, hold_s))


async def _serve(
    settings: Settings, replicas: Fleet, ca: bytes | None, server_name: str, max_held: int, hold_s: float
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics()
    identity = Identity(settings.api_key_file)
    connect = connector(ca, server_name)
    holder = Activator(replicas, identity, connect, max_held=max_held, hold_s=hold_s, registry=metrics.registry)
    keyless = KeylessQuota(MAX_KEYLESS_STREAMS, settings.max_keyless_streams_per_address)
    limits = CallLimits(settings.request_wait_s, (HEALTH_SERVICE,), keyless, metrics)
    health = Health()
    server = make_server(settings, limits, holder.handlers() | health.handlers(), CONNECTION_AGE)
    try:
        certificate = None
        if settings.tls_cert_file is not None and settings.tls_key_file is not None:
            certificate = ServerCertificate(
                settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file
            ).credentials()
        address = bind(server, settings.host, settings.port, certificate)
        probed = probe_server(settings, limits, health.handlers())
    except (BindError, CertificateError) as error:
        raise StartError(str(error)) from None
    servers = [server] if probed is None else [server, probed]
    works = [replicas.follow, *identity.works]
    async with serving_metrics(metrics, settings):
        tasks = [asyncio.create_task(keep_running(work, repr(work))) for work in works]
        for each in servers:
            await each.start()
        health.set(("", HEALTH_SERVICE, *SERVICES), health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", address=address)
        await stop.wait()
        log.info("draining", held=holder.num_held)
        health.drain()
        holder.drain()
        health.end_watches()
        await asyncio.gather(*(each.stop(settings.drain_grace_s) for each in servers))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
