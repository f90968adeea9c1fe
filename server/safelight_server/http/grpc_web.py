"""gRPC-Web: the methods of the gRPC services for pages in browsers, without a proxy.

A request is one message in a frame (a byte of flags, four bytes of length). The
response has a frame for each message, then a frame with the status as trailers,
because browsers do not show HTTP trailers to pages. The text form is the same in
base64. Specification: PROTOCOL-WEB.md of grpc/grpc.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from contextlib import aclosing
from urllib.parse import quote

from google.rpc import code_pb2, status_pb2
from starlette.exceptions import HTTPException

from safelight_server.api.service import Handler
from safelight_server.domain.errors import FieldViolation, InvalidRequestError
from safelight_server.http.calls import CLOSE, HttpCall
from safelight_server.http.context import DETAILS

BINARY, TEXT = "application/grpc-web+proto", "application/grpc-web-text+proto"
ANSWERS: Mapping[str, str] = {
    BINARY: BINARY,
    "application/grpc-web": BINARY,
    TEXT: TEXT,
    "application/grpc-web-text": TEXT,
}
"""The content type of the response, by that of the request."""
HEAD = struct.Struct(">BL")
MESSAGE, TRAILERS = 0x00, 0x80
PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
"""Characters that `grpc-message` has unchanged; all others are percent-encoded."""


class GrpcWebMethod:
    """Answers requests for one method, by its handler."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, call: HttpCall) -> None:
        """Sends the frames of the answer, and the status OK."""
        request = _message(call)
        if self._handler.response_streaming:
            async with aclosing(call.context.stream(self._handler, request)) as answers:
                async for answer in answers:
                    await _send(call, MESSAGE, answer)
        else:
            await _send(call, MESSAGE, await call.context.unary(self._handler, request))
        await send_status(call, status_pb2.Status(code=code_pb2.OK))


async def send_status(call: HttpCall, status: status_pb2.Status) -> None:
    """Ends an answer with a status."""
    trailers = {"grpc-status": str(status.code), "grpc-message": quote(status.message, safe=PRINTABLE)}
    if status.details:
        trailers[DETAILS] = base64.b64encode(status.SerializeToString()).decode("ascii")
    await _send(call, TRAILERS, "".join(f"{name}: {value}\r\n" for name, value in trailers.items()).encode("ascii"))
    await call.finish()


def _kind(call: HttpCall) -> str:
    """The content type of the answer.

    Raises:
        HTTPException: the request is not gRPC-Web.
    """
    given = call.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in ANSWERS:
        raise HTTPException(415, f"send content-type: {BINARY}", CLOSE)
    return ANSWERS[given]


async def _send(call: HttpCall, flags: int, data: bytes) -> None:
    kind = _kind(call)
    if not call.started:
        await call.start({"content-type": kind, "cache-control": "no-cache", "x-accel-buffering": "no"})
    frame = HEAD.pack(flags, len(data)) + data
    await call.write(base64.b64encode(frame) if kind == TEXT else frame)


def _message(call: HttpCall) -> bytes:
    """The message in the one frame of a request.

    Raises:
        InvalidRequestError: the body is not one uncompressed message in a frame.
    """
    data, whole = call.body, False
    if _kind(call) == TEXT:
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error:
            data = b""
    if len(data) >= HEAD.size:
        flags, length = HEAD.unpack_from(data)
        whole = flags == MESSAGE and length == len(data) - HEAD.size
    if not whole:
        what = "must be one message in a frame of gRPC-Web, not compressed"
        raise InvalidRequestError([FieldViolation("request", what)])
    return data[HEAD.size :]
