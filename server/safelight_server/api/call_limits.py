"""Wraps every call: bounds the calls that no caller's quota counts, and ends each with a status that has a reason.

gRPC waits for a request without a time limit, and calls a handler only when the request has come. `CallLimits` wraps
every handler: it takes a call over when its headers come, reads the request within a limited time, and then calls the
handler. It also turns the errors that a handler raises, and calls of unknown methods, into statuses with an ErrorInfo.
It tracks the open calls, because gRPC gives some of them no proper end: it cuts calls that are open when the server
stops, and never ends a call whose handler is cancelled from within.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeAlias, cast
from urllib.parse import unquote

import grpc
import structlog
from google.protobuf.message import DecodeError

from safelight_server import wire
from safelight_server.domain.errors import (
    DeadlineExceededError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    QueueFullError,
    SafelightError,
    UnavailableError,
    UnimplementedError,
)
from safelight_server.telemetry import Metrics

log = structlog.get_logger(__name__)

MAX_AWAITED = 1024
"""Bound on the calls whose request has not come; one more ends the oldest. Normal requests follow their headers within
milliseconds, so a flood of mere headers loses its own calls first."""
RETRY_S = 1.0
"""RetryInfo of a refusal. Nothing says when a stream will be closed; retries at this interval are no load."""
QUIET_S = 0.2
"""A server that stops waits until no call has begun or ended for so long. A client that has its picture sends its next
request within milliseconds, and the refusal then says when to come back: after 1 s or more."""
QUIET_PARTS = 4
"""`QUIET_S` is waited in so many parts: in each the event loop takes up new calls, so that a stall of the loop alone
does not count as quiet."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class KeylessQuota:
    """Counts the open streams that need no key, in all and by the address of their client. Pure.

    Args:
        max_all: how many may be open.
        max_each: how many may be open from one address, or from one IPv6 network of 64 bits, which is one client's.
    """

    def __init__(self, max_all: int, max_each: int) -> None:
        self._max_all = max_all
        self._max_each = max_each
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    @contextmanager
    def stream(self, peer: str) -> Iterator[None]:
        """Counts a stream while the block runs. `peer` is the client's address as gRPC gives it.

        Raises:
            QueueFullError: too many are open.
        """
        address = _address(peer)
        for subject, num_open, limit in (
            (f"address {address}", self._open[address], self._max_each),
            ("this server", self._open.total(), self._max_all),
        ):
            if num_open >= limit:
                raise QueueFullError(
                    f"{subject} has {limit} streams of health and reflection open, as many as it may have",
                    reason="TOO_MANY_STREAMS",
                    metadata={"bound": "keyless streams", "subject": subject, "limit": str(limit)},
                    retry_after_s=RETRY_S,
                )
        self._open[address] += 1
        try:
            yield
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]


class CallLimits:
    """The limits of all calls of a server.

    Args:
        request_wait_s: seconds within which the request must come; on a stream of requests, each of them.
        keyless: full names of the services that need no key.
        quota: bounds the streams of these services.
        metrics: counts the calls that are refused here.
    """

    def __init__(self, request_wait_s: float, keyless: Collection[str], quota: KeylessQuota, metrics: Metrics) -> None:
        self._request_wait_s = request_wait_s
        self._keyless = keyless
        self._quota = quota
        self._metrics = metrics
        self._awaited: dict[Context, None] = {}  # the oldest first
        self._open: dict[Context, asyncio.Task[Any]] = {}
        self._num_changes = 0
        self._changed_at = -math.inf
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def num_awaited(self) -> int:
        """Calls whose request, or next request, has not come yet."""
        return len(self._awaited)

    @property
    def num_open(self) -> int:
        """Calls that are being answered."""
        return len(self._open)

    def end_awaited(self) -> None:
        """Ends the calls whose request has not come, with UNAVAILABLE."""
        for context in list(self._awaited):
            self._end(context, UnavailableError("the server is draining; ask another", reason="DRAINING"))

    def end_open(self) -> None:
        """Ends all calls, with UNAVAILABLE where they have no status yet."""
        for context, task in list(self._open.items()):
            if not context.done():
                error = UnavailableError("the server is draining; ask another", reason="DRAINING")
                self._end(context, error, task)

    async def quiet(self, within_s: float, hurry: Callable[[], bool]) -> None:
        """Waits until no call has begun or ended for `QUIET_S`; for `within_s` seconds at most, and not in a `hurry`.

        When a gRPC server stops, calls that it has not taken up yet, and calls that come before the client is notified,
        end as CANCELLED without a reason (grpc/grpc#41785). After this wait there are none, unless clients never pause.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        num_quiet = QUIET_PARTS if loop.time() - self._changed_at > QUIET_S else 0
        while num_quiet < QUIET_PARTS and loop.time() < until and not hurry():
            seen = self._num_changes
            await asyncio.sleep(QUIET_S / QUIET_PARTS)
            num_quiet = num_quiet + 1 if self._num_changes == seen else 0

    def limited(self, service: str, handler: Handler) -> Handler:
        """A handler that reads the requests within the limits and calls `handler`, of a method of `service`, with them.

        It is registered with a stream of requests, the same on the wire: otherwise gRPC itself would read the request.
        """
        keyless = service in self._keyless
        codec = handler.request_deserializer, handler.response_serializer
        one_to_one, many_to_one = cast(Any, handler.unary_unary), cast(Any, handler.stream_unary)
        one_to_many, many_to_many = cast(Any, handler.unary_stream), cast(Any, handler.stream_stream)

        async def answer(_requests: object, context: Context) -> Any:
            async with self._answering(context):
                if handler.request_streaming:
                    return await many_to_one(self._requests(context), context)
                return await one_to_one(await self._request(context), context)

        async def stream(_requests: object, context: Context) -> None:
            async with self._answering(context):
                with self._quota.stream(context.peer()) if keyless else contextlib.nullcontext():
                    if handler.request_streaming:
                        responses = many_to_many(self._requests(context), context)
                    else:
                        responses = one_to_many(await self._request(context), context)
                    async with aclosing(responses):
                        async for response in responses:
                            await context.write(response)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, *codec)
        return grpc.stream_unary_rpc_method_handler(answer, *codec)

    def unknown(self) -> Handler:
        """A handler for methods that the server does not have."""
        error = UnimplementedError("the server has no method of this name; reflection lists its methods")

        async def refuse(_requests: object, context: Context) -> None:
            async with self._answering(context):
                raise error

        return grpc.stream_unary_rpc_method_handler(refuse)

    @asynccontextmanager
    async def _answering(self, context: Context) -> AsyncGenerator[None, None]:
        """Counts a call while the block answers it, and turns the errors of the block into statuses."""
        task = asyncio.current_task()
        assert task is not None
        self._open[context] = task
        self._note_change()
        try:
            yield
        except SafelightError as error:
            await self._refuse(context, error)
        except grpc.aio.InternalError:  # the client left just before a write
            raise asyncio.CancelledError from None
        except asyncio.CancelledError:
            if task.cancelling() or context.done():  # cancelled by gRPC since the client has left, or ended before
                raise
            log.exception("bug: a call was given up although its client waits")
            await self._refuse(context, InternalError())
        finally:
            del self._open[context]
            self._note_change()

    def _note_change(self) -> None:
        self._num_changes += 1
        self._changed_at = asyncio.get_running_loop().time()

    # --- requests ---

    async def _request(self, context: Context) -> Any:
        """The one request of a call.

        Raises:
            InvalidRequestError: the call ended without a request, or sent something else.
        """
        if (request := await self._read(context)) is grpc.aio.EOF:
            raise InvalidRequestError([FieldViolation("request", "is missing: the call ended without one")])
        return request

    async def _requests(self, context: Context) -> AsyncGenerator[Any, None]:
        """The requests of a call, until the client ends its side.

        Raises:
            InvalidRequestError: the client sent something else.
        """
        while (request := await self._read(context)) is not grpc.aio.EOF:
            yield request

    async def _read(self, context: Context) -> Any:
        """The next request of a call, or EOF. Ends the call if that takes too long, or if too many calls wait."""
        timer = asyncio.get_running_loop().call_later(self._request_wait_s, self._end_late, context)
        self._awaited[context] = None
        if len(self._awaited) > MAX_AWAITED:
            self._end_oldest()
        try:
            return await context.read()
        except DecodeError as error:
            raise InvalidRequestError([FieldViolation("request", f"cannot be parsed: {error}")]) from None
        finally:
            timer.cancel()
            self._awaited.pop(context, None)

    def _end_late(self, context: Context) -> None:
        what = f"no request came within {self._request_wait_s:g} s"
        self._end(context, DeadlineExceededError(what, reason="NO_REQUEST"))

    def _end_oldest(self) -> None:
        oldest = next(iter(self._awaited))
        del self._awaited[oldest]
        what = f"more than {MAX_AWAITED} calls wait for their requests, and this call waits longest"
        self._end(oldest, QueueFullError(what, reason="TOO_MANY_CALLS"))

    # --- ends ---

    def _end(self, context: Context, error: SafelightError, task: asyncio.Task[Any] | None = None) -> None:
        """Ends a call from outside of its handler. What the handler awaits of its context then fails.

        Args:
            task: the task of the handler. It is cancelled when the call has its status, which gRPC would not do.
        """
        ending = asyncio.create_task(self._refuse_quietly(context, error, task))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _refuse_quietly(self, context: Context, error: SafelightError, task: asyncio.Task[Any] | None) -> None:
        if context not in self._open:  # the handler has ended meanwhile, and grpc has freed the call
            return
        with contextlib.suppress(grpc.aio.BaseError, asyncio.CancelledError):
            await self._refuse(context, error)
        if task is not None:
            task.cancel()

    async def _refuse(self, context: Context, error: SafelightError) -> None:
        self._metrics.refused(error.reason)
        try:
            await context.abort(error.status, error.message, wire.trailing_metadata(error))
        except grpc.aio.InternalError:  # the client has left
            raise asyncio.CancelledError from None


def _address(peer: str) -> str:
    """The host of a peer such as "ipv4:127.0.0.1:5"; of an IPv6 host its network of 64 bits; other peers unchanged."""
    kind, _, rest = peer.partition(":")
    host = unquote(rest).rpartition(":")[0].strip("[]")
    if kind == "ipv4":
        return host
    if kind == "ipv6":
        try:
            address = ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            return host
        return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return peer
