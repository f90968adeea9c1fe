"""The error that a refused or failed call raises."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2


class GenerationError(Exception):
    """The server refused a call, or a generation failed.

    Attributes:
        code: the gRPC status code.
        reason: a stable name for programs, such as "QUEUE_FULL"; empty where the server sent none.
        violations: for an invalid request, what to change: path of the field -> description.
        retry_after_s: seconds after which to retry; None where the server sent none.
    """

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(f"{error.code().name}: {error.details()}")
        self.code = error.code()
        self.reason = ""
        self.violations: dict[str, str] = {}
        self.retry_after_s: float | None = None
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                self._read(status_pb2.Status.FromString(value))

    def _read(self, status: status_pb2.Status) -> None:
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        for detail in status.details:
            if detail.Unpack(info):
                self.reason = info.reason
            elif detail.Unpack(bad):
                self.violations = {v.field: v.description for v in bad.field_violations}
            elif detail.Unpack(retry):
                self.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
