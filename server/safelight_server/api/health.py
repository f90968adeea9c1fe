"""gRPC health checks. Clients that watch the health do not keep a draining server from stopping."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """The service grpc.health.v1.Health; its Watch streams end when the server drains."""

    def __init__(self) -> None:
        super().__init__()
        self._over = asyncio.Event()

    async def Watch(  # noqa: N802  # the contract's name
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> None:
        """Sends the health and its changes until the client leaves or `end_watches` is called."""
        watch, over = asyncio.create_task(super().Watch(request, context)), asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait([watch, over], return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            over.cancel()
        if over.done():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is draining; ask another")
        await watch

    def end_watches(self) -> None:
        """Ends all Watch streams with UNAVAILABLE, and those that begin later at once."""
        self._over.set()
