"""One HTTP request: recognizes the caller, checks its quota, runs a method, and answers or says why not.

It does for HTTP what the handlers of `api/service.py` do for gRPC. A request
ends early when its client leaves, when its deadline passes, or when the server
ends its stream; what it had started is then cancelled. Invariant: the bytes of a
request are bounded before they are read, in number and in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from safelight_server.api.identity import Identity
from safelight_server.api.quota import StreamQuota
from safelight_server.api.streams import CallStream
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import (
    DeadlineExceededError,
    FieldViolation,
    GenerationCancelledError,
    InternalError,
    InvalidRequestError,
    SafelightError,
)
from safelight_server.http.errors import error_response, refusal_response
from safelight_server.telemetry import Metrics, Stage, Tracing
from safelight_server.telemetry.tracing import fault

log = structlog.get_logger(__name__)

BODY_S = 30.0
"""How long a client may take to send its request, after the headers."""
TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
"""A time limit as gRPC writes it: at most 8 digits and a unit."""
UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
CLOSE = {"connection": "close"}
"""With an answer that comes before the whole request was read."""


class HttpStream(CallStream):
    """The state of a request, and its response. Whoever ends it cancels the task that answers it.

    Attributes:
        body: of the request; empty until it was read.
        status: the status code that was sent; 0 before.
    """

    def __init__(self, request: Request, send: Send, stage: Stage) -> None:
        super().__init__(stage, None)
        self.request = request
        self.body = b""
        self.status = 0
        self._send = send
        self._written_at = 0.0
        self._task: asyncio.Task[object] | None = None

    # --- how it ends ---

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """While the block runs, the client's leaving, the deadline and `end` cancel the running task."""
        self._task = asyncio.current_task()
        listening = asyncio.create_task(self._listen())
        timer = None
        if self.time_left_s is not None:
            late = DeadlineExceededError("the deadline passed")
            timer = asyncio.get_running_loop().call_later(self.time_left_s, self.end, late)
        try:
            yield
        except asyncio.CancelledError:
            if self.failure is None or self._task is None:
                raise  # by someone else: the server stops
            self._task.uncancel()
            raise self.failure from None
        finally:
            self._task = None
            listening.cancel()
            if timer is not None:
                timer.cancel()

    async def _listen(self) -> None:
        """Ends the request when its client leaves. Nothing else is received: the body was read before."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.end(GenerationCancelledError("the client has gone"))

    def end(self, error: SafelightError) -> None:
        """Ends the request with an error, from outside of its handler; after its end this does nothing."""
        if self._task is not None and self.failure is None:
            self.failure = error
            self._task.cancel()

    # --- its response ---

    @property
    def started(self) -> bool:
        """Whether the response has begun."""
        return bool(self.status)

    async def send(self, message: Message) -> None:
        """Sends a message of ASGI; every response goes through here."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self._written_at = asyncio.get_running_loop().time()
        await self._send(message)

    async def start(self, headers: Mapping[str, str]) -> None:
        """Begins a response that `write` sends piece by piece."""
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": 200, "headers": raw})

    async def write(self, data: bytes) -> None:
        """Sends a piece, and waits until the client's connection takes more: what is asked for then is the newest."""
        await self.send({"type": "http.response.body", "body": data, "more_body": True})
        await self.send({"type": "http.response.body", "body": b"", "more_body": True})  # waits, and sends nothing

    @property
    def silent_s(self) -> float:
        """Seconds since the last piece of the response."""
        return asyncio.get_running_loop().time() - self._written_at

    async def finish(self) -> None:
        """Ends a response that `start` has begun."""
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def respond(self, response: Response) -> None:
        """Sends a whole response."""
        await response(self.request.scope, self.request.receive, self.send)


Method = Callable[[Caller, HttpStream], Awaitable[Response | None]]
"""Answers a request: returns the response, or has sent it by itself."""
Fail = Callable[[HttpStream, SafelightError], Awaitable[None]]
"""Says to the client why a response that has begun goes no further."""


class Calls:
    """Runs the requests of all routes.

    Args:
        max_body_bytes: bound on the body of a request.
    """

    def __init__(
        self, identity: Identity, quota: StreamQuota, metrics: Metrics, tracer: Tracing, max_body_bytes: int
    ) -> None:
        self._identity = identity
        self._quota = quota
        self._metrics = metrics
        self._tracer = tracer
        self._max_body_bytes = max_body_bytes

    async def run(self, request: Request, send: Send, route: str, method: Method, fail: Fail) -> None:
        """Runs one request.

        Args:
            route: the pattern of its path, for traces and metrics.
            fail: called in place of an error response where the response has begun.
        """
        stage = self._tracer.http_call(request.method, route, request.headers.items())
        stage.enter()
        stream = HttpStream(request, send, stage)
        failure: SafelightError | None = None
        try:
            response = await self._answer(stream, method)
            if response is not None:
                await stream.respond(response)
        except HTTPException as refusal:
            await stream.respond(refusal_response(refusal))
        except ClientDisconnect:
            failure = GenerationCancelledError("the client has gone")
        except SafelightError as error:
            failure = error.with_traceback(None)  # a traceback would keep frames, and those the generation, alive
        except Exception:  # the one mapping of bugs to a status
            log.exception("bug", route=route)
            failure = InternalError()
        if failure is not None:
            await self._fail(stream, failure, fail)
        stage.note({"http.response.status_code": stream.status})
        if failure is not None:
            stage.note({"safelight.reason": failure.reason})
        stage.end("" if failure is None else fault(failure.status.name, failure.reason))
        self._metrics.http_request(route, stream.status)

    async def _answer(self, stream: HttpStream, method: Method) -> Response | None:
        request = stream.request
        stream.time_left_s = _time_left_s(request)
        caller = self._identity.recognize(request.headers.items(), _peer(request))
        with self._quota.stream(caller):
            stream.body = await self._read(request)
            with stream.open():
                return await method(caller, stream)

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

    async def _fail(self, stream: HttpStream, error: SafelightError, fail: Fail) -> None:
        """Tells the client, and counts what was refused."""
        if stream.watcher is None:
            self._metrics.refused(error.reason)
            log.info("refused", reason=error.reason, message=error.message)
        if stream.started:
            await fail(stream, error)
        else:
            await stream.respond(error_response(error))


class Endpoint:
    """An ASGI application for one route.

    Args:
        path: the pattern of its path.
        fail: as for `Calls.run`; None: its response is sent whole.
    """

    def __init__(self, calls: Calls, path: str, method: Method, fail: Fail | None = None) -> None:
        self._calls = calls
        self._path = path
        self._method = method
        self._fail = fail or _give_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._calls.run(Request(scope, receive), send, self._path, self._method, self._fail)


async def _give_up(_stream: HttpStream, _error: SafelightError) -> None:
    """A response that is sent whole has begun, so nothing can be said any more."""


def _time_left_s(request: Request) -> float | None:
    """Seconds that the header `grpc-timeout` gives the request; None without one.

    Raises:
        InvalidRequestError: it has another form.
    """
    text = request.headers.get("grpc-timeout")
    if text is None:
        return None
    match = TIMEOUT.fullmatch(text)
    if match is None:
        what = "must be at most 8 digits and a unit, H, M, S, m, u or n: 30S is 30 seconds, 500m half a second"
        raise InvalidRequestError([FieldViolation("header grpc-timeout", what)])
    return int(match[1]) * UNITS_S[match[2]]


def _peer(request: Request) -> str:
    """The address of the client in gRPC's form."""
    if request.client is None:
        return ""
    host, port = request.client
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
