"""Shared memory with real servers: it is not reused while an abandoned call may still write to it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as triton_grpc
from google.protobuf import text_format
from safelight_server.catalog import catalog
from safelight_server.domain.component import Component
from safelight_server.runtime import verification
from safelight_server.runtime.triton.client import CallFailed, Trouble
from safelight_server.runtime.triton.models import models_of
from safelight_server.runtime.triton.server import Server, SharedMemoryUse
from tritonclient.grpc import model_config_pb2

from tests.conftest import MODELS, eventually
from tests.triton.developing import assert_exact, develop_all, mixed
from tests.triton.support import READY_S, REPOSITORY, triton_server

pytestmark = pytest.mark.timeout(180)

KEY = ("icons", Component.DENOISER)
WORK_LIMIT_S = 30.0


def ours() -> set[str]:
    return {file.name for file in Path("/dev/shm").glob("safelight-*")}


@pytest.fixture
def models():
    return models_of(catalog.load(MODELS))


def server_at(triton, models) -> Server:
    return Server(triton.grpc_url, models, SharedMemoryUse.ON, calls_at_once=1, limit_s=2.0)


async def test_memory_of_a_call_given_up_is_not_reused_before_its_answer(models):
    with triton_server() as triton:
        server = server_at(triton, models)
        await server.probe(WORK_LIMIT_S)
        first, second = (verification.example(server.served(KEY).specs(), rows) for rows in (2, 3))
        expected = await server.run(KEY, first, WORK_LIMIT_S)
        [region] = server.regions._idle[KEY, ()]
        region._views["prediction"][:] = 0.0
        triton.stop()
        with pytest.raises(CallFailed) as caught:
            await server.run(KEY, first, 0.2)
        assert caught.value.trouble is Trouble.HUNG
        assert server.regions.num_quarantined == 1
        waiting = asyncio.create_task(server.run(KEY, second, WORK_LIMIT_S))
        triton.cont()
        results = await waiting  # in other memory than that of the late answer
        alone = await server._run_over_grpc(KEY, second, limit_s=WORK_LIMIT_S)
        assert np.array_equal(results["prediction"], alone["prediction"])
        await eventually(lambda: server.regions.num_quarantined == 0)
        assert np.array_equal(region._views["prediction"][:2], expected["prediction"])  # the server did write it
        assert len(server.regions._idle[KEY, ()]) == 2
        await server.close()


async def test_regions_are_given_to_a_server_that_has_been_restarted(models):
    with triton_server() as triton:
        server = server_at(triton, models)
        await server.probe(WORK_LIMIT_S)
        feed = verification.example(server.served(KEY).specs(), 2)
        expected, _ = await asyncio.gather(*(server.run(KEY, feed, WORK_LIMIT_S) for _ in range(2)))
        before = {region.name for region in server.regions._idle[KEY, ()]}
        assert len(before) == 2
        await asyncio.to_thread(triton.kill)
        with pytest.raises(CallFailed) as caught:
            await server.run(KEY, feed, WORK_LIMIT_S)
        assert caught.value.trouble is Trouble.DEAD
        assert server.regions.num_quarantined == 1
        triton.restart()
        await eventually(triton.ready, READY_S)
        await server._client._client._channel.channel_ready()
        again = await server.run(KEY, feed, WORK_LIMIT_S)  # without a probe, by the server's answer
        assert np.array_equal(again["prediction"], expected["prediction"])
        assert server.regions.num_quarantined == 0
        async with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
            known = (await client.get_system_shared_memory_status()).regions
            assert set(known) == {file for file in ours() if file.startswith(server.regions._prefix)}
        assert not before & ours()
        await server.close()


async def test_gateways_come_and_go_and_leave_nothing(start, triton):
    before = ours()
    settings = {"runtime": "triton", "triton_url": triton.grpc_url, "triton_shared_memory": "on"}
    requests = mixed(2, steps=(6,))
    seen = []
    async with start(**settings) as standing:
        for _ in range(2):
            async with start(**settings) as running:
                seen.append(await develop_all(running.address, requests))
                assert len(ours()) > len(before)
        assert_exact(requests, await develop_all(standing.address, requests), seen[0])
    assert_exact(requests, seen[1], seen[0])
    assert ours() == before
    async with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
        assert not (await client.get_system_shared_memory_status()).regions


async def test_a_full_queue_is_no_dead_server(start, tmp_path, triton):
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY, repository)
    config = repository / "icons_denoiser" / "config.pbtxt"
    parsed = text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())
    parsed.dynamic_batching.default_queue_policy.max_queue_size = 1
    config.write_text(text_format.MessageToString(parsed))
    requests = mixed(6, steps=(12,))
    async with start(runtime="triton", triton_url=triton.grpc_url) as running:
        expected = await develop_all(running.address, requests)
    with triton_server("--repository", repository) as full:
        async with start(runtime="triton", triton_url=full.grpc_url, triton_instances=6) as running:
            endpoints, refusals = running.runtime.endpoints, []
            refused = endpoints.refused
            endpoints.refused = lambda *given: refusals.append(given) or refused(*given)
            assert_exact(requests, await develop_all(running.address, requests), expected)
            assert refusals
            assert endpoints._endpoints[0].epoch == 0  # never ejected
