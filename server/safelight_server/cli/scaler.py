"""`safelight scaler`: tells KEDA how many replicas a fleet needs."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import grpc
import structlog
import typer
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from safelight_server.telemetry import configure_logging

log = structlog.get_logger(__name__)
GRACE_S = 5.0
EXTRA = "{} not installed: in a clone of Safelight, pip install -e clients/python -e '.[scaler]'"


def scaler(
    prometheus: Annotated[
        str, typer.Option(envvar="SAFELIGHT_SCALER_PROMETHEUS", help="URL of the Prometheus that scrapes the replicas.")
    ],
    host: Annotated[str, typer.Option(envvar="SAFELIGHT_SCALER_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            envvar="SAFELIGHT_SCALER_PORT",
            min=0,
            max=65535,
            help="Port of KEDA's contract, without TLS; 0: a free one.",
        ),
    ] = 8431,
    log_format: Annotated[str, typer.Option(envvar="SAFELIGHT_LOG_FORMAT", help="console or json.")] = "console",
) -> None:
    """Tell KEDA how many replicas a fleet needs: from its queue, its deadlines and a forecast."""
    configure_logging(log_format, "info")
    if not prometheus.startswith(("http://", "https://")):
        raise typer.BadParameter(
            f"{prometheus!r} must be a URL such as http://prometheus:9090", param_hint="--prometheus"
        )
    try:
        uvloop.run(_serve(prometheus, host, port))
    except ModuleNotFoundError as error:
        typer.echo(EXTRA.format(error.name), err=True)
        raise typer.Exit(2) from error


async def _serve(prometheus_url: str, host: str, port: int) -> None:
    from safelight_server.scaler.fleets import Fleets  # here, since the extra may be missing
    from safelight_server.scaler.prometheus import Prometheus
    from safelight_server.scaler.service import ExternalScaler

    prometheus = Prometheus(prometheus_url)
    fleets = Fleets(prometheus)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((ExternalScaler(fleets).handler(),))
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise typer.BadParameter(f"{host}:{port} cannot be listened on", param_hint="--port") from error
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    log.info("serving", address=f"{host}:{bound}", prometheus=prometheus_url)
    await stop.wait()
    await server.stop(GRACE_S)
    await fleets.close()
    await prometheus.close()
