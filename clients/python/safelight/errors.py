"""The error that a refused or failed call raises."""

from __future__ import annotations

from typing import Self

import grpc
from google.rpc import error_details_pb2, status_pb2


class GenerationError(Exception):
    """The server refused a call, or a generation failed.

    Attributes:
        code: the gRPC status code. CANCELLED without a reason, which a stopping server sends, becomes UNAVAILABLE.
        reason: a stable name for programs, such as "QUEUE_FULL"; empty if the server sent none.
        violations: for an invalid request, what to change: path of the field -> description.
        retry_after_s: seconds after which to retry; None if the server sent none.

    Args:
        proxy: the proxy of the call, as "VARIABLE=URL"; the message names it if the server could not be reached.
    """

    def __init__(self, error: grpc.aio.AioRpcError, proxy: str = "") -> None:
        self.code = error.code()
        self.reason = ""
        self.violations: dict[str, str] = {}
        self.retry_after_s: float | None = None
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                self._read(status_pb2.Status.FromString(value))
        said = error.details()
        if self.code is grpc.StatusCode.CANCELLED and not self.reason:  # not by this client: that raises no error
            self.code, said = grpc.StatusCode.UNAVAILABLE, f"the call was cancelled, and not by its caller: {said}"
        if proxy and self.code is grpc.StatusCode.UNAVAILABLE:
            said = f"{said} (asked through the proxy of {proxy}; list the server in no_proxy to ask it directly)"
        super().__init__(f"{self.code.name}: {said}")

    @classmethod
    def unfinished(cls, generation: str) -> Self:
        """The error of a stream that a server, or a proxy before it, ended well before the generation's last event."""
        nothing = grpc.aio.Metadata()
        message = f"the stream of {generation or 'the generation'} ended before the generation had finished"
        return cls(grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, message))

    @classmethod
    def late(cls, message: str) -> Self:
        """The error of a call whose deadline has passed before it was sent."""
        nothing = grpc.aio.Metadata()
        return cls(grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, nothing, nothing, message))

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
