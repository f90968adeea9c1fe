"""Builds the HTTP side of the server from its settings, and serves it if a port is set."""

from __future__ import annotations

from collections.abc import Callable

from safelight_server.api.identity import Identity
from safelight_server.api.images import ImageCalls
from safelight_server.api.service import Service
from safelight_server.app.certificate import ServerCertificate
from safelight_server.catalog.catalog import Catalog
from safelight_server.http.app import build_app
from safelight_server.http.calls import Calls
from safelight_server.http.context import Rpcs
from safelight_server.http.server import HttpLimits, HttpServer, bind
from safelight_server.settings import Settings, is_loopback
from safelight_server.telemetry import Metrics

REQUEST_BYTES = 64 << 10
"""Bytes that a request may have in addition to its two prompts."""
CHARACTER_BYTES = 12
"""Most bytes of one character in JSON: two escapes of six."""


def max_body_bytes(settings: Settings) -> int:
    """Bound on the body of a request that is no form."""
    return REQUEST_BYTES + 2 * CHARACTER_BYTES * settings.max_prompt_chars


class HttpPort:
    """HTTP on the port of the settings. Does nothing without a port.

    Attributes:
        address: HOST:PORT; empty before `start`, and if HTTP is off.
    """

    def __init__(
        self,
        settings: Settings,
        service: Service,
        catalog: Catalog,
        identity: Identity,
        metrics: Metrics,
        certificate: ServerCertificate | None,
        uploads: ImageCalls,
    ) -> None:
        self.address = ""
        self._settings = settings
        self._rpcs = Rpcs(service.handlers())
        self._catalog = catalog
        self._certificate = certificate
        self._uploads = uploads
        self._max_body_bytes = max_body_bytes(settings)
        self._calls = Calls(identity, metrics, self._max_body_bytes)
        self._server: HttpServer | None = None

    async def start(self, healthy: Callable[[], bool]) -> None:
        """Begins to serve.

        Args:
            healthy: whether the server takes work.

        Raises:
            CertificateError: the certificate cannot be used any more.
            OSError: the port is in use, or the address is not this machine's.
        """
        settings = self._settings
        if not settings.http_port:
            return
        app = build_app(
            self._rpcs,
            self._catalog,
            self._calls,
            self._uploads,
            healthy,
            max_text_bytes=self._max_body_bytes,
            cors_origins=settings.cors_origins,
            only_loopback=not settings.requires_credentials and is_loopback(settings.host),
        )
        tls = None if self._certificate is None else self._certificate.context()
        limits = HttpLimits(settings.http_max_connections, settings.watcher_stall_s)
        self._server = await HttpServer.start(app, bind(settings.host, settings.http_port), limits, tls)
        self.address = self._server.address

    async def stop(self, grace_s: float) -> None:
        """Stops listening and lets responses be sent for `grace_s`; a second call may shorten that."""
        if self._server is not None:
            await self._server.stop(grace_s)
