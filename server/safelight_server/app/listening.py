"""Opens the ports of the server once all of its parts are there, and drains it at its end.

It starts the gRPC servers, HTTP and the background work, tells the health service how the runtime is, and ends them in
an order in which clients get their last messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

import structlog
from grpc_health.v1 import health_pb2

from safelight_server.api.call_limits import CallLimits
from safelight_server.api.health import HEALTH_SERVICE, Health
from safelight_server.api.reflection import Reflection
from safelight_server.api.service import (
    CACHE_SERVICE,
    GENERATION_SERVICE,
    IMAGE_SERVICE,
    MODEL_SERVICE,
    QUOTA_SERVICE,
    Service,
)
from safelight_server.app.address import BindError, bind
from safelight_server.app.certificate import CertificateError, ServerCertificate
from safelight_server.app.errors import StartError
from safelight_server.app.grpc_server import make_server, probe_server
from safelight_server.app.http_server import HttpPort
from safelight_server.engine.engine import Engine
from safelight_server.generations.registry import Generations
from safelight_server.settings import Settings
from safelight_server.telemetry import Metrics
from safelight_server.telemetry.background import keep_running
from safelight_server.telemetry.metrics_server import MetricsServer

log = structlog.get_logger(__name__)

HEALTH_PERIOD_S = 0.25
"""Pause between two checks of the runtime for the health service."""
LAST_WORDS_S = 1.0
"""Least time that open streams get at shutdown to send their last message."""

Work = Callable[[], Coroutine[None, None, None]]
"""A background coroutine that runs until the server ends."""


@contextlib.asynccontextmanager
async def listening(
    settings: Settings,
    certificate: ServerCertificate | None,
    service: Service,
    http: HttpPort,
    limits: CallLimits,
    engine: Engine,
    generations: Generations,
    works: Sequence[Work],
) -> AsyncIterator[tuple[str, Callable[[float], asyncio.Task[None]]]]:
    """Accepts calls and runs the background works while the block runs; yields the address and the drain function."""
    health = Health()
    services = (GENERATION_SERVICE, MODEL_SERVICE, IMAGE_SERVICE, CACHE_SERVICE, QUOTA_SERVICE, HEALTH_SERVICE)
    handlers = service.handlers() | health.handlers() | Reflection(services).handlers()
    server = make_server(settings, limits, handlers)
    credentials = None if certificate is None else certificate.credentials()
    try:
        address = bind(server, settings.host, settings.port, credentials)
        probed = probe_server(settings, limits, health.handlers())
    except BindError as error:
        raise StartError(str(error)) from None
    draining: list[asyncio.Task[None]] = []
    try:
        await http.start(lambda: not draining and not engine.outage.beyond_grace)
    except CertificateError as error:
        raise StartError(str(error)) from None
    except OSError as error:
        raise StartError(f"http_port {settings.http_port} of {settings.host}: {error.strerror}") from None
    servers = [server] if probed is None else [server, probed]
    for each in servers:
        await each.start()
    names = ("", *services)
    health.set(names, health_pb2.HealthCheckResponse.SERVING)
    background = [_begin(work) for work in works]
    following = _begin(functools.partial(follow_health, health, names, engine))

    async def drain(grace_s: float) -> None:
        until = time.monotonic() + grace_s
        following.cancel()
        health.drain()
        await generations.drain(grace_s)
        health.end_watches()
        limits.end_awaited()
        if grace_s > 0:
            await limits.quiet(LAST_WORDS_S, lambda: len(draining) > 1)
        left_s = max(LAST_WORDS_S, until - time.monotonic())  # gRPC and HTTP may still be sending
        ending_calls = asyncio.get_running_loop().call_later(left_s - LAST_WORDS_S / 2, limits.end_open)
        await asyncio.gather(*(each.stop(left_s) for each in servers), http.stop(left_s))
        ending_calls.cancel()

    def start_drain(grace_s: float) -> asyncio.Task[None]:
        """Starts a drain. A second drain with a shorter grace ends the first one early."""
        if not draining:
            log.info("draining", grace_s=grace_s)
        draining.append(asyncio.create_task(drain(grace_s)))
        return draining[-1]

    try:
        yield address, start_drain
    finally:
        await start_drain(0.0)
        for task in background:
            task.cancel()
        await asyncio.wait([*background, *draining])


def _begin(work: Work) -> asyncio.Task[None]:
    """Starts a background work as a task, and again after an exception."""
    return asyncio.create_task(keep_running(work, repr(work)))


async def follow_health(health: Health, names: Sequence[str], engine: Engine) -> None:
    """Keeps the health service up to date: NOT_SERVING once the runtime has been away for longer than its grace.

    `HEALTH_SERVICE` stays SERVING: liveness probes check it, and restarting this process would not help the runtime.
    """
    names = [name for name in names if name != HEALTH_SERVICE]
    current = health_pb2.HealthCheckResponse.SERVING
    while True:
        status = health_pb2.HealthCheckResponse
        now = status.NOT_SERVING if engine.outage.beyond_grace else status.SERVING
        if now is not current:
            health.set(names, now)
            current = now
        await asyncio.sleep(HEALTH_PERIOD_S)


@contextlib.asynccontextmanager
async def serving_metrics(metrics: Metrics, settings: Settings) -> AsyncIterator[None]:
    """Serves Prometheus metrics on `metrics_host`; without it on loopback, or on `host` if `insecure` is set.

    There is neither TLS nor a check of keys.

    Raises:
        StartError: the address is in use or not this machine's.
    """
    if not settings.metrics_port:
        yield
        return
    beyond = settings.insecure and not settings.host.startswith("unix:")
    host = settings.metrics_host or (settings.host if beyond else "127.0.0.1")
    async with contextlib.AsyncExitStack() as ends:
        try:
            await ends.enter_async_context(MetricsServer(metrics.registry).listening(host, settings.metrics_port))
        except OSError as error:
            raise StartError(f"metrics_port {settings.metrics_port} of {host}: {error.strerror}") from None
        yield
