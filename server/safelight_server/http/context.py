"""Replaces gRPC's context for methods that are called over HTTP: metadata, deadline, abort and cancellation.

The handlers of `api/service.py` are called in this process with such a context
instead of gRPC's. So callers, quotas, deadlines, traces, metrics and errors are
the same for both protocols, by construction.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import NoReturn, cast

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from starlette.requests import Request

from safelight_server.api.service import Handler
from safelight_server.domain.errors import (
    DeadlineExceededError,
    FieldViolation,
    GenerationCancelledError,
    InvalidRequestError,
    SafelightError,
)
from safelight_server.wire.statuses import status_of

DETAILS = "grpc-status-details-bin"
TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
"""A time limit as gRPC writes it: at most 8 digits and a unit."""
UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class CallAbortError(grpc.aio.AbortError):
    """A call has ended with a status.

    Attributes:
        status: the status with all details.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class HttpContext:
    """The parts of grpc.aio.ServicerContext that handlers use, for one HTTP request.

    It is made in the task that answers the request. When the server, the deadline or the client's leaving ends the call
    from another task, that task is cancelled.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._task = asyncio.current_task()
        self._until: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended: status_pb2.Status | None = None

    # --- as grpc.aio.ServicerContext ---

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers of the request, names in lower case."""
        return tuple(self._request.headers.items())

    def peer(self) -> str:
        """The address of the client in gRPC's form."""
        if self._request.client is None:
            return ""
        host, port = self._request.client
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None: there is none."""
        return None if self._until is None else self._until - asyncio.get_running_loop().time()

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, bytes], ...] = ()
    ) -> NoReturn:
        """Ends the call with a status, from within its handler or from another task."""
        status = status_pb2.Status(code=code.value[0], message=details)
        if data := dict(trailing_metadata).get(DETAILS):
            status.ParseFromString(data)
        self._end(status)
        raise CallAbortError(status)

    # --- as the caller of a handler ---

    @contextlib.asynccontextmanager
    async def calling(self) -> AsyncIterator[None]:
        """Lets the client's leaving, the deadline and `abort` end the block.

        Raises:
            CallAbortError: one of them has ended it.
            InvalidRequestError: the header `grpc-timeout` is malformed.
        """
        loop = asyncio.get_running_loop()
        left_s = _time_left_s(self._request)
        listening = asyncio.create_task(self._listen())
        if left_s is not None:
            self._until = loop.time() + left_s
            self._timer = loop.call_later(left_s, self._end_with, DeadlineExceededError("the deadline passed"))
        try:
            yield
        except asyncio.CancelledError:
            if self._ended is None or self._task is None:
                raise  # cancelled for another reason: the server stops
            self._task.uncancel()
        finally:
            self._task = None
            listening.cancel()
            if self._timer is not None:
                self._timer.cancel()
        if self._ended is not None:
            raise CallAbortError(self._ended)

    def hand_over_deadline(self) -> None:
        """Lets the deadline no longer end the call: another server does that from here on."""
        if self._timer is not None:
            self._timer.cancel()

    async def stream(self, handler: Handler, request: Message | bytes) -> AsyncGenerator[bytes, None]:
        """The serialized responses of a streaming method. Must be used within `calling`."""
        method = cast(Callable[[bytes, HttpContext], AsyncGenerator[bytes, None]], handler.unary_stream)
        async with contextlib.aclosing(method(_bytes(request), self)) as answers:
            async for answer in answers:
                yield answer

    async def unary(self, handler: Handler, request: Message | bytes) -> bytes:
        """The serialized response of a unary method. Must be used within `calling`."""
        method = cast(Callable[[bytes, HttpContext], Awaitable[bytes]], handler.unary_unary)
        return await method(_bytes(request), self)

    async def _listen(self) -> None:
        """Ends the call when its client leaves. The body was read before, so nothing else can be received."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._end_with(GenerationCancelledError("the client has gone"))

    def _end_with(self, error: SafelightError) -> None:
        self._end(status_of(error))

    def _end(self, status: status_pb2.Status) -> None:
        """Sets the status, unless there is one, and cancels the task of the call unless it is the current one."""
        if self._task is not None and self._ended is None:
            self._ended = status
            if asyncio.current_task() is not self._task:
                self._task.cancel()


class Rpcs:
    """The methods of the gRPC services, by full name of the service and name of the method."""

    def __init__(self, handlers: Mapping[str, Mapping[str, Handler]]) -> None:
        self._handlers = handlers

    def find(self, service: str, name: str) -> Handler:
        """The handler of a method."""
        return self._handlers[service][name]

    def of(self, service: str) -> Mapping[str, Handler]:
        """The handlers of all methods of a service."""
        return self._handlers[service]


def _bytes(request: Message | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def _time_left_s(request: Request) -> float | None:
    text = request.headers.get("grpc-timeout")
    if text is None:
        return None
    match = TIMEOUT.fullmatch(text)
    if match is None:
        what = "must be at most 8 digits and a unit, H, M, S, m, u or n: 30S is 30 seconds, 500m half a second"
        raise InvalidRequestError([FieldViolation("header grpc-timeout", what)])
    return int(match[1]) * UNITS_S[match[2]]
