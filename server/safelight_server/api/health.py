"""What the server says of its health; those who watch it hold up no drain. Neighbour: `app`."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """grpc.health.v1.Health, whose streams end with the server."""

    def __init__(self) -> None:
        super().__init__()
        self._over = asyncio.Event()

    async def Watch(  # noqa: N802  # the contract's name
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> None:
        """The status and its changes, until `end_watches`."""
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
        """Ends all streams, and those to come."""
        self._over.set()
