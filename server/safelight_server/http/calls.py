"""One HTTP request: reads it within bounds, runs a method, and answers or says why not.

Invariant: the bytes of a request are bounded before they are read, in number and
in time, and are read from known callers alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping

import structlog
from google.rpc import status_pb2
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from safelight_server.api.identity import Identity
from safelight_server.domain.errors import InternalError, SafelightError
from safelight_server.http.context import CallAbortError, HttpContext
from safelight_server.http.errors import CLIENT_CLOSED_REQUEST, error_response, refusal_response
from safelight_server.telemetry import Metrics
from safelight_server.wire.statuses import status_of

log = structlog.get_logger(__name__)

BODY_S = 30.0
"""How long a client may take to send its request, after the headers."""
CLOSE = {"connection": "close"}
"""With an answer that comes before the whole request was read."""


class HttpCall:
    """A request that was read, and its response.

    Attributes:
        request: its headers and path.
        context: with which it calls methods of gRPC.
        body: of the request; empty until it was read.
        status: the status code that was sent; 0 before.
    """

    def __init__(self, request: Request, send: Send) -> None:
        self.request = request
        self.context = HttpContext(request)
        self.body = b""
        self.status = 0
        self._send = send
        self._written_at = 0.0

    @property
    def started(self) -> bool:
        """Whether the response has begun."""
        return bool(self.status)

    @property
    def silent_s(self) -> float:
        """Seconds since the last piece of the response."""
        return asyncio.get_running_loop().time() - self._written_at

    async def start(self, headers: Mapping[str, str]) -> None:
        """Begins a response that `write` sends piece by piece."""
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._pass({"type": "http.response.start", "status": 200, "headers": raw})

    async def write(self, data: bytes) -> None:
        """Sends a piece, and waits until the client's connection takes more: what is asked for then is the newest."""
        await self._pass({"type": "http.response.body", "body": data, "more_body": True})
        await self._pass({"type": "http.response.body", "body": b"", "more_body": True})  # waits, and sends nothing

    async def finish(self) -> None:
        """Ends a response that `start` has begun."""
        await self._pass({"type": "http.response.body", "body": b"", "more_body": False})

    async def respond(self, response: Response) -> None:
        """Sends a whole response."""
        await response(self.request.scope, self.request.receive, self._pass)

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self._written_at = asyncio.get_running_loop().time()
        await self._send(message)


Method = Callable[[HttpCall], Awaitable[Response | None]]
"""Answers a request: returns the response, or has sent it by itself."""
Fail = Callable[[HttpCall, status_pb2.Status], Awaitable[None]]
"""Says to the client why there is no answer, or why one that has begun goes no further."""


async def respond_error(call: HttpCall, status: status_pb2.Status) -> None:
    """A `Fail` for responses that are sent whole: of one that has begun nothing more can be said."""
    if not call.started:
        await call.respond(error_response(status))


class Calls:
    """Runs the requests of all routes.

    Args:
        max_body_bytes: bound on the body of a request.
    """

    def __init__(self, identity: Identity, metrics: Metrics, max_body_bytes: int) -> None:
        self._identity = identity
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def run(self, call: HttpCall, route: str, method: Method, fail: Fail) -> None:
        """Runs one request. `route` is the pattern of its path, for the metrics."""
        failure: status_pb2.Status | None = None
        try:
            response = await self._answer(call, method)
            if response is not None:
                await call.respond(response)
        except HTTPException as refusal:
            await call.respond(refusal_response(refusal))
        except ClientDisconnect:
            call.status = CLIENT_CLOSED_REQUEST
        except CallAbortError as error:  # the handler has counted and logged it
            failure = error.status
        except SafelightError as error:
            self._metrics.refused(error.reason)
            log.info("refused", reason=error.reason, message=error.message)
            failure = status_of(error)
        except Exception:  # the one mapping of bugs to a status
            log.exception("bug", route=route)
            failure = status_of(InternalError())
        if failure is not None:
            await self._tell(call, failure, route, fail)
        self._metrics.http_request(route, call.status)

    async def _tell(self, call: HttpCall, failure: status_pb2.Status, route: str, fail: Fail) -> None:
        try:
            await fail(call, failure)
        except HTTPException as refusal:
            await call.respond(refusal_response(refusal))
        except Exception:  # uvicorn closes the connection
            log.exception("bug", route=route)
            raise

    async def _answer(self, call: HttpCall, method: Method) -> Response | None:
        # a handler asks again; here it is for the body, which is not read from strangers
        self._identity.recognize(call.context.invocation_metadata(), call.context.peer())
        call.body = await self._read(call.request)
        async with call.context.calling():
            return await method(call)

    async def _read(self, request: Request) -> bytes:
        """Reads the whole body, within its bounds.

        Raises:
            HTTPException: it is too large or comes too slowly.
            ClientDisconnect: the client has left.
        """
        most = self._max_body_bytes
        too_large = HTTPException(413, f"the body has more than {most} bytes; send less", CLOSE)
        if int(request.headers.get("content-length", "0")) > most:  # h11 has checked that it is a number
            raise too_large
        pieces, num_bytes = [], 0
        try:
            async with asyncio.timeout(BODY_S), contextlib.aclosing(request.stream()) as body:
                async for piece in body:
                    pieces.append(piece)
                    num_bytes += len(piece)
                    if num_bytes > most:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {BODY_S:g} s", CLOSE) from None
        return b"".join(pieces)


class Endpoint:
    """An ASGI application for one route, whose path has the pattern `path`."""

    def __init__(self, calls: Calls, path: str, method: Method, fail: Fail = respond_error) -> None:
        self._calls = calls
        self._path = path
        self._method = method
        self._fail = fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._calls.run(HttpCall(Request(scope, receive), send), self._path, self._method, self._fail)
