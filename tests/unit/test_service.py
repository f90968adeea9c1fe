"""Ends of calls that no client can cause on purpose."""

import asyncio

import grpc
import pytest
from safelight_server.api.service import Service
from safelight_server.domain.errors import DeadlineExceededError
from safelight_server.telemetry import Metrics


async def test_a_client_that_is_gone_when_its_call_is_ended_is_no_bug() -> None:
    class Gone:
        async def abort(self, *_: object) -> None:
            raise grpc.aio.InternalError("the batch cannot be executed")

    service = object.__new__(Service)
    service._metrics = Metrics()
    with pytest.raises(asyncio.CancelledError):
        await service._abort(Gone(), DeadlineExceededError("the deadline passed"))  # type: ignore[arg-type]
