"""Listens for HTTP/1.1 with uvicorn, in the event loop of the gRPC server, and bounds what clients can hold.

Bounds: connections, the size and the time of a request's headers, idle
connections, and clients that do not read. uvicorn has the first three in part:
it never ends a connection that sends its headers one byte at a time (uvicorn's
issue 157), nor one that reads nothing.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

HEAD_S = 10.0
"""How long a client may take for the headers of a request, and for the handshake of TLS."""
KEEP_ALIVE_S = 75
"""How long a connection may lie idle between requests; longer than the pause of most pools of connections."""
MAX_HEAD_BYTES = 16 << 10
BACKLOG = 1024
UNSENT_BYTES = 16 << 10
"""What the kernel keeps of a stream before it says that it takes no more: later previews are made later."""
CANCEL_S = 1.0
"""How long requests that were cancelled may take to end."""
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What clients may hold.

    Attributes:
        max_connections: open connections of all clients.
        stall_s: how long a client may read nothing of what is there for it.
    """

    max_connections: int
    stall_s: float


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol of one connection, with the bounds that it lacks.

    Two timers: one runs while the headers of a request are awaited and some of them are there, or none has come since
    the connection was made; the other one while the client does not read.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, limits: HttpLimits) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        # A write waits until the kernel has all of the one before. With 0 TLS takes an empty buffer for a full one.
        transport.set_write_buffer_limits(high=1, low=0)
        if len(self.connections) > self._limits.max_connections:
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_has_come()
        self._client_reads()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        else:
            self._head_has_come()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._client_reads()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _head_has_come(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _client_reads(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class HttpServer:
    """Serves an ASGI application on a socket that listens.

    Attributes:
        address: HOST:PORT.
    """

    def __init__(self, address: str, server: asyncio.Server, state: ServerState) -> None:
        self.address = address
        self._server = server
        self._state = state

    @classmethod
    async def start(
        cls,
        app: ASGIApp,
        listening: socket.socket,
        limits: HttpLimits,
        tls: ssl.SSLContext | None,
    ) -> HttpServer:
        """Begins to serve, in the clear where `tls` is None."""
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # what goes wrong within a request is logged where it is answered
            access_log=False,
            proxy_headers=False,  # the address of a caller is the one that calls, as over gRPC
            server_header=False,
            date_header=False,  # by the application, as uvicorn's own clock would be one more task
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            reset_contextvars=True,
        )
        config.load()
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            functools.partial(BoundedProtocol, config, state, limits),
            sock=listening,
            ssl=tls,
            backlog=BACKLOG,
            ssl_handshake_timeout=HEAD_S if tls else None,
        )
        host, port = listening.getsockname()[:2]
        return cls(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", server, state)

    async def stop(self, grace_s: float) -> None:
        """Takes no more connections, lets answers be sent for `grace_s`, and closes what is left.

        A second call with a shorter grace cuts the first one short.
        """
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()  # an idle one closes; another one after its answer
        await self._idle_within(grace_s)
        for task in self._state.tasks:
            task.cancel()
        for connection in list(self._state.connections):
            connection.transport.abort()
        await self._idle_within(CANCEL_S)

    async def _idle_within(self, seconds: float) -> None:
        """Waits until there is neither a connection nor a request, for so many seconds at most."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (self._state.connections or self._state.tasks) and loop.time() < until:  # noqa: ASYNC110  # uvicorn's sets
            await asyncio.sleep(POLL_S)


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address. What it accepts keeps little that was not sent yet.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # as gRPC binds it
    listening = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return listening
