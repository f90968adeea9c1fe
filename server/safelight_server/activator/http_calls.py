"""Forwards requests of HTTP to a replica as bytes: OpenAI's image API with its events, and gRPC-Web.

`http/calls.py` has read the request by then, within the bounds of a replica, and knows its caller: whoever has no key
wakes no machine. So a request that a replica has not begun to answer can be sent to another one. The answer is passed
on piece by piece, no faster than the client reads; when the client leaves, the connection to the replica is closed,
which cancels the generation. Invariant: once a replica has begun to answer, the client gets its answer, or one that is
visibly cut off.
"""

from __future__ import annotations

import contextlib
import math

import httpx2
import structlog
from google.rpc import status_pb2
from starlette.exceptions import HTTPException

from safelight_server.activator.connector import Connector
from safelight_server.activator.replicas import Replica
from safelight_server.activator.waiting_room import RETRY_S, WaitingRoom
from safelight_server.api.images import UPLOAD_S, UploadRoom
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import SafelightError, UnavailableError
from safelight_server.http.calls import Fail, HttpCall, bounded, discard, num_announced, timely

log = structlog.get_logger(__name__)

UNAVAILABLE = 503
OF_THE_CONNECTION = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
)
"""Headers that belong to a connection, not to a request or its answer (RFC 9110, 7.6.1)."""
OF_ONE_REQUEST = OF_THE_CONNECTION | {"content-length", "grpc-timeout"}
"""Headers of a request that are not passed on: the last two are written anew."""
OF_ONE_ANSWER = OF_THE_CONNECTION | {"date"}
"""Headers of an answer that are not passed on: `http.app.Front` adds the date."""

LARGEST_MS = 99_999_999
"""gRPC writes a time limit with at most 8 digits."""


class HttpForwarder:
    """Answers requests with the answers of replicas."""

    def __init__(self, room: WaitingRoom, connector: Connector) -> None:
        self._room = room
        self._connector = connector

    async def __call__(self, call: HttpCall) -> None:
        """Holds a request until there is a replica, and passes on its answer.

        Raises:
            QueueFullError: as many calls are held as may be.
            UnavailableError: there was no replica in time, or it was lost before it answered.
        """
        other = await self._ask(call, await self._room.replica(), last=False)
        if other is not None:
            await self._ask(call, other, last=True)

    async def _ask(self, call: HttpCall, replica: Replica, *, last: bool) -> Replica | None:
        """Passes on the answer of a replica. Returns the replica to be asked in its place, if it has none."""
        refusal: httpx2.Response | None = None
        with replica.call():
            try:
                response = await replica.http.handle_async_request(self._request(call, replica))
                if not last and response.status_code == UNAVAILABLE:
                    await response.aread()
                    refusal = response
            except httpx2.TransportError as error:
                log.warning("replica_lost", address=replica.address, error=repr(error))
            else:
                if refusal is None:
                    async with contextlib.aclosing(response):
                        await _pass_on(call, response)
                    return None
        gone = refusal is None or _code(refusal) == "DRAINING"
        other = None if last else await self._room.another(replica, gone=gone)
        if other is None and refusal is None:
            raise UnavailableError("the replica was lost before it answered; try again", retry_after_s=RETRY_S)
        if other is None and refusal is not None:
            await _pass_on(call, refusal)
        return other

    def _request(self, call: HttpCall, replica: Replica) -> httpx2.Request:
        scope = call.request.scope
        headers = [(name, value) for name, value in scope["headers"] if name.decode("latin-1") not in OF_ONE_REQUEST]
        left_s = call.context.time_remaining()
        if left_s is not None:
            headers.append((b"grpc-timeout", b"%dm" % min(max(1, math.ceil(left_s * 1e3)), LARGEST_MS)))
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        return self._connector.http_request(replica.address, call.request.method, target, headers, call.body)


class WholeBodyReader:
    """Reads the form of an edit whole and as it is, in room that all forms share.

    Args:
        max_bytes: bound on a form.
    """

    def __init__(self, room: UploadRoom, max_bytes: int) -> None:
        self._room = room
        self._max_bytes = max_bytes

    async def __call__(self, call: HttpCall, caller: Caller) -> None:
        """Reads the body; the room is the form's until the request has its answer."""
        try:
            call.held.enter_context(self._room.upload(caller.tenant, num_announced(call.request, self._max_bytes)))
        except (HTTPException, SafelightError):
            await discard(call.request)
            raise
        async with timely(UPLOAD_S), contextlib.aclosing(bounded(call.request, self._max_bytes)) as pieces:
            call.body = b"".join([piece async for piece in pieces])


def before_answers(fail: Fail) -> Fail:
    """Sends errors as `fail` does, but nothing into the answer of a replica: that ends where it is, cut off."""

    async def fail_once(call: HttpCall, status: status_pb2.Status) -> None:
        if not call.started:
            await fail(call, status)

    return fail_once


async def _pass_on(call: HttpCall, response: httpx2.Response) -> None:
    call.context.hand_over_deadline()  # the replica has it too, and can still say so within its answer
    headers = {name: value for name, value in response.headers.items() if name not in OF_ONE_ANSWER}
    await call.start(headers, response.status_code)
    try:
        if response.is_stream_consumed:
            await call.write(response.content)
        else:
            async with contextlib.aclosing(response.aiter_raw()) as pieces:
                async for piece in pieces:
                    await call.write(piece)
    except httpx2.TransportError as error:  # the request stays without its end, so uvicorn closes the connection
        log.warning("answer_cut_off", error=repr(error))
    else:
        await call.finish()


def _code(refusal: httpx2.Response) -> str:
    """The code of an error, from its body; empty where it has none."""
    try:
        return str(refusal.json()["error"]["code"])
    except (ValueError, TypeError, KeyError):
        return ""
