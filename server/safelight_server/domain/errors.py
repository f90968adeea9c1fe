"""Every error that a client can see: its gRPC status and its stable reason.

    SafelightError
    ├── InvalidRequestError        INVALID_ARGUMENT     with field violations
    ├── UnauthenticatedError       UNAUTHENTICATED
    ├── AdminOnlyError             PERMISSION_DENIED    a call for administrators
    ├── NotFoundError              NOT_FOUND            unknown model or generation, or someone else's
    ├── AlreadyExistsError         ALREADY_EXISTS       a request id used again with another body
    ├── FailedPreconditionError    FAILED_PRECONDITION  the generation has ended
    ├── QueueFullError             RESOURCE_EXHAUSTED   with the time after which to retry
    ├── DeadlineUnreachableError   DEADLINE_EXCEEDED    refused at admission, nothing computed
    ├── DeadlineExceededError      DEADLINE_EXCEEDED    passed while waiting or running
    ├── GenerationCancelledError   CANCELLED            the caller or another stream cancelled it
    ├── UnavailableError           UNAVAILABLE          draining, stalled stream, no runtime
    └── InternalError              INTERNAL             a bug: fixed text, details in the log

Invariant: the mapping to a status is made here and nowhere else. `wire.py`
turns these into google.rpc.Status; `service.py` ends calls with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc

MAX_TOLD = 3
"""Violations in the message of an InvalidRequestError; the details have the others."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One fault of a request: `field` is its path in the proto, `description` says what to change."""

    field: str
    description: str


class SafelightError(Exception):
    """Base of all errors with a status.

    Attributes:
        message: for people; safe to show to the caller.
        metadata: further facts for `google.rpc.ErrorInfo`.
        retry_after_s: when a retry makes sense, if ever.
        violations: the fields of the request that are to blame.
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
    """The request cannot be served as it is. The violations list all its faults, the message the first."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        first = "; ".join(f"{v.field}: {v.description}" for v in violations[:MAX_TOLD])
        more = len(violations) - MAX_TOLD
        super().__init__(first + (f"; and {more} more" if more > 0 else ""), violations=violations)


class UnauthenticatedError(SafelightError):
    """No key, or one that is not known."""

    status = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class AdminOnlyError(SafelightError):
    """A call for administrators, by someone who is none."""

    status = grpc.StatusCode.PERMISSION_DENIED
    reason = "ADMIN_ONLY"


class NotFoundError(SafelightError):
    """An unknown model or generation; someone else's generation looks the same."""

    status = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class AlreadyExistsError(SafelightError):
    """A request id that was used with another body."""

    status = grpc.StatusCode.ALREADY_EXISTS
    reason = "REQUEST_ID_REUSED"


class FailedPreconditionError(SafelightError):
    """What is asked needs a generation that has not ended."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "GENERATION_ENDED"


class QueueFullError(SafelightError):
    """A bounded queue is full; `retry_after_s` comes from the real backlog."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class DeadlineUnreachableError(SafelightError):
    """The deadline cannot be met at the measured step time; nothing was computed."""

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


class UnavailableError(SafelightError):
    """The server cannot go on now; a retry elsewhere or later can."""

    status = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class InternalError(SafelightError):
    """A bug. The caller gets a fixed text; the log has the details under the trace id."""

    status = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self) -> None:
        super().__init__("internal error; the server's log has the details")
