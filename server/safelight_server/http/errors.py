"""Statuses as HTTP responses: the status code of each gRPC status, and OpenAI's form of the body.

    {"error": {"message": …, "type": …, "param": …, "code": …, "safelight": {"violations": […], "metadata": {…}}}}

`code` is the reason of the error, the same as over gRPC (docs/operations/errors.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

CLIENT_CLOSED_REQUEST = 499
"""For CANCELLED, as nginx and gRPC's gateways have it; the standard has no such code."""
STATUS_CODES: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: CLIENT_CLOSED_REQUEST,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""The HTTP status code of each gRPC status, as google.rpc.Code documents it."""
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's `type` of an error by status code. Others: `invalid_request_error` below 500, otherwise `server_error`."""
_BY_NUMBER = {code.value[0]: status for code, status in STATUS_CODES.items()}
Detail = TypeVar("Detail", bound=Message)


def status_code(status: status_pb2.Status) -> int:
    """The HTTP status code of a status."""
    return _BY_NUMBER.get(status.code, 500)


def reason_of(status: status_pb2.Status) -> str:
    """The stable reason of a status."""
    info = _detail(status, error_details_pb2.ErrorInfo)
    return str(info.reason) if info is not None else "INTERNAL"


def error_body(status: status_pb2.Status) -> dict[str, Any]:
    """A status as OpenAI's API writes an error; `param` is the first faulty parameter."""
    body = _body(status_code(status), status.message, reason_of(status))
    more: dict[str, Any] = {}
    if (bad := _detail(status, error_details_pb2.BadRequest)) is not None:
        body["error"]["param"] = bad.field_violations[0].field
        more["violations"] = [{"param": fault.field, "message": fault.description} for fault in bad.field_violations]
    info = _detail(status, error_details_pb2.ErrorInfo)
    if info is not None and info.metadata:
        more["metadata"] = dict(info.metadata)
    if more:
        body["error"]["safelight"] = more
    return body


def error_response(status: status_pb2.Status) -> JSONResponse:
    """A status as a response. Its headers say whether a retry makes sense, and after how many seconds."""
    headers = {}
    retry = _detail(status, error_details_pb2.RetryInfo)
    if retry is not None:
        headers["retry-after"] = str(math.ceil(retry.retry_delay.ToTimedelta().total_seconds()))
    # OpenAI's clients retry status codes 429 and above 499, unless this header is "false"
    should_retry = retry is not None or status.code == grpc.StatusCode.UNAVAILABLE.value[0]
    headers["x-should-retry"] = "true" if should_retry else "false"
    if status.code == grpc.StatusCode.UNAUTHENTICATED.value[0]:
        wrong_token = reason_of(status) in ("TOKEN_INVALID", "TOKEN_EXPIRED")
        headers["www-authenticate"] = 'Bearer error="invalid_token"' if wrong_token else "Bearer"  # RFC 6750
    return JSONResponse(error_body(status), status_code(status), headers)


def refusal_response(refusal: HTTPException) -> JSONResponse:
    """The response for a refusal that only HTTP has, such as of a path; its code is the name of the HTTP status."""
    code = HTTPStatus(refusal.status_code).name
    return JSONResponse(_body(refusal.status_code, refusal.detail, code), refusal.status_code, headers=refusal.headers)


def _detail(status: status_pb2.Status, kind: type[Detail]) -> Detail | None:
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def _body(status: int, message: str, code: str) -> dict[str, Any]:
    kind = TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
