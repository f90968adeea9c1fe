"""The same pixels from the embedded runtime and from Triton, over shared memory and over gRPC."""

from __future__ import annotations

import grpc
import pytest
from safelight.v1 import models_pb2, models_pb2_grpc

from tests.triton.developing import Seen, assert_exact, develop_all, mixed

REQUESTS = mixed(12)


@pytest.fixture(scope="module")
def embedded_pixels() -> dict[str, list[Seen]]:
    return {}


async def _embedded(start, kept: dict[str, list[Seen]]) -> list[Seen]:
    if "seen" not in kept:
        async with start(runtime="onnx") as running:
            kept["seen"] = await develop_all(running.address, REQUESTS)
    return kept["seen"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("shared_memory", ["on", "off"])
async def test_mixed_batches_give_the_pixels_of_the_embedded_runtime(start, triton, shared_memory, embedded_pixels):
    expected = await _embedded(start, embedded_pixels)
    settings = {"runtime": "triton", "triton_url": triton.grpc_url, "triton_shared_memory": shared_memory}
    async with start(**settings) as running:
        assert [server.shares_memory for server in running.runtime.servers] == [shared_memory == "on"]
        seen = await develop_all(running.address, REQUESTS)
        assert_exact(REQUESTS, seen, expected)
        assert {one.numerics_id for one in seen} == {expected[0].numerics_id}
        async with grpc.aio.insecure_channel(running.address) as channel:
            models = await models_pb2_grpc.ModelServiceStub(channel).ListModels(models_pb2.ListModelsRequest())
            assert [model.runtime for model in models.models] == ["triton"]
