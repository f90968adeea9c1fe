"""One HTTP request: reads it within bounds, runs a method, and sends its response or an error.

Invariants: the size of a body and the time to read it are bounded; only bodies of known
callers are read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

import structlog
from google.rpc import status_pb2
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from safelight_server.api.identity import Identity
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import InternalError, SafelightError
from safelight_server.http.context import CallAbortError, HttpContext
from safelight_server.http.errors import CLIENT_CLOSED_REQUEST, error_response, refusal_response
from safelight_server.http.form import Form
from safelight_server.telemetry import Metrics
from safelight_server.wire.statuses import status_of

log = structlog.get_logger(__name__)

BODY_S = 30.0
"""How long a client may take to send its request, after the headers."""
DISCARD_S, DISCARDED_BYTES = 1.0, 1 << 20
"""How long, and how many bytes at most, the body of a refused request is read."""
CLOSE = {"connection": "close"}
"""Headers of a response that is sent before the whole request was read."""


class HttpCall:
    """A request that was read, and its response.

    Attributes:
        request: the headers and the path.
        context: the context with which it calls methods of gRPC.
        caller: the sender.
        body: the body; empty before it was read, and for a form.
        form: the body of a request that is a form.
        held: resources that are held while the body is in memory, such as room among the uploads.
        status: the status code that was sent; 0: none was sent yet.
    """

    def __init__(self, request: Request, send: Send) -> None:
        self.request = request
        self.context = HttpContext(request)
        self.caller = Caller("", "")
        self.body = b""
        self.form = Form()
        self.held = contextlib.ExitStack()
        self.status = 0
        self._send = send
        self._written_at = 0.0

    def drop_body(self) -> None:
        """Frees the body and the resources that were held for it. May be called twice."""
        self.body, self.form = b"", Form()
        self.held.close()

    @property
    def started(self) -> bool:
        """Whether the response has begun."""
        return bool(self.status)

    @property
    def silent_s(self) -> float:
        """Seconds since the last piece of the response was sent."""
        return asyncio.get_running_loop().time() - self._written_at

    async def start(self, headers: Mapping[str, str], status: int = 200) -> None:
        """Begins a response that `write` sends piece by piece."""
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._pass({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes) -> None:
        """Sends a piece and waits until the connection takes more, so that the caller then sends the newest preview."""
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
"""Sends an error to the client, as the response or at the end of a response that has begun."""


async def respond_error(call: HttpCall, status: status_pb2.Status) -> None:
    """A `Fail` for responses that are sent whole. Does nothing if the response has begun."""
    if not call.started:
        await call.respond(error_response(status))


BodyReader = Callable[[HttpCall, Caller], Awaitable[None]]
"""Reads the body of a request from a known caller into its call, with bounds on size and time. Raises an
HTTPException or a SafelightError if the body is refused."""


class Calls:
    """Runs the requests of all routes.

    Args:
        max_body_bytes: bound on the body of a request, for routes without a reader of their own.
    """

    def __init__(self, identity: Identity, metrics: Metrics, max_body_bytes: int) -> None:
        self._identity = identity
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def run(
        self, call: HttpCall, route: str, method: Method, fail: Fail, reader: BodyReader | None = None
    ) -> None:
        """Runs one request. `route` is the pattern of its path, for the metrics; `reader` reads its body."""
        failure: status_pb2.Status | None = None
        try:
            response = await self._answer(call, method, reader or self._read_whole)
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
            await self._send_failure(call, failure, route, fail)
        self._metrics.http_request(route, call.status)

    async def _send_failure(self, call: HttpCall, failure: status_pb2.Status, route: str, fail: Fail) -> None:
        try:
            await fail(call, failure)
        except HTTPException as refusal:
            await call.respond(refusal_response(refusal))
        except Exception:  # uvicorn closes the connection
            log.exception("bug", route=route)
            raise

    async def _answer(self, call: HttpCall, method: Method, read: BodyReader) -> Response | None:
        # the handler recognizes the caller again; this is done here so that no body of an unknown caller is read
        call.caller = await self._identity.recognize(call.context.invocation_metadata(), call.context.peer())
        try:
            await read(call, call.caller)
            async with call.context.calling():
                return await method(call)
        finally:
            call.drop_body()

    async def _read_whole(self, call: HttpCall, _caller: Caller) -> None:
        pieces = []
        async with timely(BODY_S), contextlib.aclosing(bounded(call.request, self._max_body_bytes)) as body:
            async for piece in body:
                pieces.append(piece)
        call.body = b"".join(pieces)


async def bounded(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The pieces of a body.

    Raises:
        HTTPException: the body has more bytes than `most`.
        ClientDisconnect: the client has left.
    """
    num_bytes = 0
    num_announced(request, most)
    async with contextlib.aclosing(request.stream()) as body:
        async for piece in body:
            num_bytes += len(piece)
            if num_bytes > most:
                raise _too_large(most)
            yield piece


def num_announced(request: Request, most: int) -> int:
    """The size of a body by its content-length header; `most` if there is no such header.

    Raises:
        HTTPException: the size is larger than `most`.
    """
    announced = int(request.headers.get("content-length", most))  # h11 has checked that it is a number
    if announced > most:
        raise _too_large(most)
    return announced


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the body has more than {most} bytes; send less", CLOSE)


async def discard(request: Request) -> None:
    """Reads the rest of a refused body if it is small: otherwise the client may lose the response.

    A connection that is closed while there are unread bytes is reset.
    """
    with contextlib.suppress(TimeoutError, HTTPException, ClientDisconnect):
        async with asyncio.timeout(DISCARD_S), contextlib.aclosing(bounded(request, DISCARDED_BYTES)) as pieces:
            async for _ in pieces:
                pass


@contextlib.asynccontextmanager
async def timely(seconds: float) -> AsyncIterator[None]:
    """Bounds the time in which a body is read.

    Raises:
        HTTPException: the time has passed.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {seconds:g} s", CLOSE) from None


class Endpoint:
    """The ASGI application of one route. `path` is the pattern of its path."""

    def __init__(
        self, calls: Calls, path: str, method: Method, fail: Fail = respond_error, reader: BodyReader | None = None
    ) -> None:
        self._calls = calls
        self._path = path
        self._method = method
        self._fail = fail
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = HttpCall(Request(scope, receive), send)
        await self._calls.run(call, self._path, self._method, self._fail, self._reader)
