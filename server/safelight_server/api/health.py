"""gRPC health checks. Clients that watch the health do not keep a draining server from stopping.

This module uses grpc_health's messages but not its servicer: in that one, a watcher that leaves makes the other
watchers of its service miss changes (grpcio-health-checking 1.81).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

import grpc
from grpc_health.v1 import health_pb2

from safelight_server.api.call_limits import Handler
from safelight_server.domain.errors import NotFoundError, UnavailableError

HEALTH_SERVICE = "grpc.health.v1.Health"
Response = health_pb2.HealthCheckResponse


class Health:
    """The service grpc.health.v1.Health; its Watch streams end when the server drains."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._draining = False
        self._over = False

    def handlers(self) -> dict[str, dict[str, Handler]]:
        """The handlers of its methods, by full name of the service and name of the method."""
        request, response = health_pb2.HealthCheckRequest.FromString, Response.SerializeToString
        return {
            HEALTH_SERVICE: {
                "Check": grpc.unary_unary_rpc_method_handler(self.check, request, response),
                "Watch": grpc.unary_stream_rpc_method_handler(self.watch, request, response),
            }
        }

    def set(self, names: Iterable[str], status: int) -> None:
        """Sets the status of services; "" is the whole server. Ignored after `drain`."""
        if not self._draining:
            self._statuses.update(dict.fromkeys(names, status))
            self._wake()

    def drain(self) -> None:
        """Sets all services to NOT_SERVING, for good."""
        self.set(list(self._statuses), Response.NOT_SERVING)
        self._draining = True

    def end_watches(self) -> None:
        """Ends all Watch streams with UNAVAILABLE, and those that begin later at once."""
        self._over = True
        self._wake()

    async def check(self, request: health_pb2.HealthCheckRequest, _context: object) -> health_pb2.HealthCheckResponse:
        """The status of a service."""
        if (status := self._statuses.get(request.service)) is None:
            raise NotFoundError("there is no service of this name here")
        return Response(status=status)

    async def watch(
        self, request: health_pb2.HealthCheckRequest, _context: object
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The status of a service and its changes, until the client leaves; SERVICE_UNKNOWN for an unknown service."""
        sent = None
        while not self._over:
            changed = self._changed
            status = self._statuses.get(request.service, Response.SERVICE_UNKNOWN)
            if status != sent:
                sent = status
                yield Response(status=status)
            else:
                await changed.wait()
        raise UnavailableError("the server is draining; ask another", reason="DRAINING")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
