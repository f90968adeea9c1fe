"""Fixtures for the tests against the real tritonserver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import tritonclient.grpc.aio as triton_grpc

from tests.triton.support import TritonServer, triton_server


@pytest.fixture(scope="session")
def triton() -> Iterator[TritonServer]:
    """One server for all tests that leave it as it is."""
    with triton_server() as server:
        yield server


@pytest.fixture
async def client(triton: TritonServer) -> AsyncIterator[triton_grpc.InferenceServerClient]:
    """A client of that server."""
    async with triton_grpc.InferenceServerClient(triton.grpc_url) as opened:
        yield opened
