"""Errors as HTTP responses: the status code of each gRPC status, and OpenAI's form of the body.

    {"error": {"message": …, "type": …, "param": …, "code": …, "safelight": {"violations": […], "metadata": {…}}}}

`code` is the reason of the error, the same as over gRPC (docs/operations/errors.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import grpc
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from safelight_server.domain.errors import SafelightError

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
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""HTTP status codes as google.rpc.Code has them."""
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's `type` of an error, by status code; of others `invalid_request_error` below 500 and `server_error` above."""


def status_code(error: SafelightError) -> int:
    """The HTTP status code of an error."""
    return STATUS_CODES[error.status]


def error_body(error: SafelightError) -> dict[str, Any]:
    """An error as OpenAI's API writes it; `param` is the first faulty parameter."""
    body = _body(status_code(error), error.message, error.reason)
    more: dict[str, Any] = {}
    if error.violations:
        body["error"]["param"] = error.violations[0].field
        more["violations"] = [{"param": one.field, "message": one.description} for one in error.violations]
    if error.metadata:
        more["metadata"] = error.metadata
    if more:
        body["error"]["safelight"] = more
    return body


def error_response(error: SafelightError) -> JSONResponse:
    """An error as a response. Its headers say after how many seconds a retry makes sense, and whether one does."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    # OpenAI's clients retry what has a status code of 429 or above 499, unless this header says that it is in vain.
    worth = error.retry_after_s is not None or error.status is grpc.StatusCode.UNAVAILABLE
    headers["x-should-retry"] = "true" if worth else "false"
    if error.status is grpc.StatusCode.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code(error), headers)


def refusal_response(refusal: HTTPException) -> JSONResponse:
    """A refusal that only HTTP has, such as of a path or a content type; its code is the name of its status."""
    code = HTTPStatus(refusal.status_code).name
    return JSONResponse(_body(refusal.status_code, refusal.detail, code), refusal.status_code, headers=refusal.headers)


def _body(status: int, message: str, code: str) -> dict[str, Any]:
    kind = TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
