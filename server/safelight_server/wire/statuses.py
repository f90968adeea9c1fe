"""Errors as google.rpc.Status messages with details, small enough for the trailing metadata of a call."""

from __future__ import annotations

from google.rpc import code_pb2, error_details_pb2, status_pb2

from safelight_server.domain.errors import QueueFullError, QuotaExceededError, SafelightError
from safelight_server.wire.times import duration

DOMAIN = "safelight"
OK = status_pb2.Status(code=code_pb2.OK)


def status_of(error: SafelightError) -> status_pb2.Status:
    """An error as a Status. It always has an ErrorInfo; BadRequest, QuotaFailure and RetryInfo where they apply."""
    status = status_pb2.Status(code=error.status.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    status.details.add().Pack(info)
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad)
    if isinstance(error, QueueFullError | QuotaExceededError) and "subject" in error.metadata:
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=error.metadata["subject"], description=error.message)
        status.details.add().Pack(quota)
    if error.retry_after_s is not None:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s)))
    return status


def trailing_metadata(error: SafelightError) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata in which gRPC sends the Status of an error with its details."""
    return (("grpc-status-details-bin", status_of(error).SerializeToString()),)
