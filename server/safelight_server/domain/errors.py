"""Every error that a client can see: its gRPC status and its stable reason.

    SafelightError
    ├── InvalidRequestError        INVALID_ARGUMENT     with field violations
    ├── UnauthenticatedError       UNAUTHENTICATED
    ├── AdminOnlyError             PERMISSION_DENIED    a call for administrators
    ├── TokenNotAllowedError       PERMISSION_DENIED    a valid token, whose caller may not use this server
    ├── NotFoundError              NOT_FOUND            unknown model or generation, or someone else's
    ├── AlreadyExistsError         ALREADY_EXISTS       a request id used again with another body
    ├── FailedPreconditionError    FAILED_PRECONDITION  the generation has ended
    ├── QueueFullError             RESOURCE_EXHAUSTED   with the time after which to retry
    ├── QuotaExceededError         RESOURCE_EXHAUSTED   a tenant is beyond its rate of requests or its compute
    ├── DeadlineUnreachableError   DEADLINE_EXCEEDED    refused at admission, nothing computed
    ├── DeadlineExceededError      DEADLINE_EXCEEDED    passed while waiting or running
    ├── GenerationCancelledError   CANCELLED            the caller or another stream cancelled it
    ├── UnimplementedError         UNIMPLEMENTED        no such method
    ├── UnavailableError           UNAVAILABLE          draining, stalled stream, no runtime
    └── InternalError              INTERNAL             a bug: fixed text, details in the log

Invariant: each error's gRPC status is set here and nowhere else.
`wire/statuses.py` turns an error into a google.rpc.Status; `api/service.py`
ends calls with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc

MAX_QUOTED = 3
"""How many violations the message of an InvalidRequestError quotes; the details have all of them."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One fault of a request: `field` is its path in the proto, `description` says what to change."""

    field: str
    description: str


class SafelightError(Exception):
    """Base of all errors with a status.

    Attributes:
        message: the text for the caller; has no internal details.
        metadata: facts for programs, sent in `google.rpc.ErrorInfo`.
        retry_after_s: seconds after which a retry makes sense; None where none does.
        violations: the faulty fields of the request.
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: str = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.violations = tuple(violations)


class InvalidRequestError(SafelightError):
    """The request has faulty fields. `violations` lists all faults; `message` quotes the first of them."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        first = "; ".join(f"{v.field}: {v.description}" for v in violations[:MAX_QUOTED])
        more = len(violations) - MAX_QUOTED
        super().__init__(first + (f"; and {more} more" if more > 0 else ""), violations=violations)


class UnauthenticatedError(SafelightError):
    """The call has no API key and no token, or one that is not known or not valid."""

    status = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class AdminOnlyError(SafelightError):
    """The call is for administrators, and the caller is not one."""

    status = grpc.StatusCode.PERMISSION_DENIED
    reason = "ADMIN_ONLY"


class TokenNotAllowedError(SafelightError):
    """The token is valid, and lacks a claim that this server requires of its callers."""

    status = grpc.StatusCode.PERMISSION_DENIED
    reason = "TOKEN_NOT_ALLOWED"


class NotFoundError(SafelightError):
    """There is no such model or generation. Generations of other tenants are answered with this error too."""

    status = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class AlreadyExistsError(SafelightError):
    """The request id was used before, with another body."""

    status = grpc.StatusCode.ALREADY_EXISTS
    reason = "REQUEST_ID_REUSED"


class FailedPreconditionError(SafelightError):
    """The generation has ended, and the call needs one that has not."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "GENERATION_ENDED"


class QueueFullError(SafelightError):
    """A bounded queue is full. `retry_after_s` is estimated from the work in the queue."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class QuotaExceededError(SafelightError):
    """The tenant exceeds its rate of requests or has used its compute. `retry_after_s`: until the next is allowed."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "REQUEST_RATE_EXCEEDED"


class DeadlineUnreachableError(SafelightError):
    """Refused at admission: the deadline cannot be met at the measured time per step. Nothing was computed."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_UNREACHABLE"


class DeadlineExceededError(SafelightError):
    """The deadline passed while the generation waited or ran."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class GenerationCancelledError(SafelightError):
    """The generation was cancelled by its caller."""

    status = grpc.StatusCode.CANCELLED
    reason = "GENERATION_CANCELLED"


class UnimplementedError(SafelightError):
    """The server has no method of this name."""

    status = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNKNOWN_METHOD"


class UnavailableError(SafelightError):
    """The server cannot serve the call now; a retry later or at another replica can succeed."""

    status = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class InternalError(SafelightError):
    """A bug of the server. The caller gets a fixed text; the log has the details under the trace id."""

    status = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self) -> None:
        super().__init__("internal error; the server's log has the details")
