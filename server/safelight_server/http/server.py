"""Listens for HTTP/1.1 with uvicorn, in the event loop of the gRPC server, and bounds connections and slow clients.

Bounds: connections, the size and the time of a request's headers, idle connections,
and clients that do not read. uvicorn has only a part of these: it never ends a
connection that sends its headers one byte at a time (uvicorn's issue 157), nor one that
reads nothing.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from dataclasses import dataclass

import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from safelight_server.http.errors import refusal_response

HEAD_S = 10.0
"""How long a client may take for the headers of a request, and for the handshake of TLS."""
KEEP_ALIVE_S = 75
"""How long a connection may be idle between requests; longer than most connection pools keep one."""
MAX_HEAD_BYTES = 16 << 10
BACKLOG = 1024
UNSENT_BYTES = 16 << 10
"""Unsent bytes of a connection in the kernel above which writes wait, so that a preview is made as late as possible."""
CANCEL_S = 1.0
"""How long requests that were cancelled may take to end."""
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds on the connections of clients.

    Attributes:
        max_connections: open connections of all clients.
        stall_s: how long a client may read nothing while there is something to read.
    """

    max_connections: int
    stall_s: float


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol of one connection, with the bounds that it lacks.

    There are two timers. The head timer runs from the beginning of a connection or the first byte of a request until
    its headers are complete. The stall timer runs while the client does not read.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, limits: HttpLimits) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        # A write waits until the kernel has the previous one. high=0 would not do: TLS takes an empty buffer for full.
        transport.set_write_buffer_limits(high=1, low=0)
        if len(self.connections) > self._limits.max_connections:
            transport.abort()
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._start_head_timer()
        else:
            self._stop_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_timer()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class BoundedHead:
    """ASGI middleware that refuses requests whose request line and headers have more than `MAX_HEAD_BYTES`.

    h11 looks at the size of a head that is not complete yet, and lets any pass that comes in one piece.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (num_bytes := _num_head_bytes(scope)) > MAX_HEAD_BYTES:
            what = f"the request line and the headers have {num_bytes} bytes; at most {MAX_HEAD_BYTES} are taken"
            await refusal_response(HTTPException(400, what, {"connection": "close"}))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _num_head_bytes(scope: Scope) -> int:
    """The bytes of a head as clients write it: "METHOD TARGET HTTP/1.1", then "name: value" of each header."""
    target = len(scope["raw_path"]) + (len(scope["query_string"]) + 1 if scope["query_string"] else 0)
    line = len(scope["method"]) + target + len("  HTTP/1.1\r\n")
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"]) + len("\r\n")


class HttpServer:
    """Serves an ASGI application on a listening socket.

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
        """Begins to serve; without TLS if `tls` is None."""
        config = uvicorn.Config(
            BoundedHead(app),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # errors within a request are logged by `calls.py`
            access_log=False,
            proxy_headers=False,  # a caller's address is that of its connection, as over gRPC
            server_header=False,
            date_header=False,  # `app.Front` adds it; uvicorn would run one more task for its clock
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
        """Stops listening, lets responses be sent for `grace_s`, and then closes the remaining connections.

        A second call with a shorter grace ends the first one early.
        """
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()  # closes an idle connection at once, and a busy one after its response
        await self._idle_within(grace_s)
        for task in self._state.tasks:
            task.cancel()
        for connection in list(self._state.connections):
            connection.transport.abort()
        await self._idle_within(CANCEL_S)

    async def _idle_within(self, seconds: float) -> None:
        """Waits until there is neither a connection nor a request, for `seconds` at most."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (self._state.connections or self._state.tasks) and loop.time() < until:  # noqa: ASYNC110  # uvicorn's sets
            await asyncio.sleep(POLL_S)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Its connections keep few unsent bytes in the kernel (`UNSENT_BYTES`).

    Raises:
        OSError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # as gRPC binds it
    listening = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return listening
