"""Servers die, hang and lose their models under load, and every picture continues from the step it had reached."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import tritonclient.grpc.aio as triton_grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.conftest import eventually
from tests.triton.developing import Load, Seen, assert_exact, develop_all, mixed
from tests.triton.support import triton_server, triton_servers

pytestmark = pytest.mark.timeout(240)

REQUESTS = mixed(6, steps=(30, 34, 40))
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def kept() -> dict[str, list[Seen]]:
    return {}


@pytest.fixture
async def undisturbed(start, kept):
    """The pictures of the requests by the embedded runtime."""
    if "seen" not in kept:
        async with start(runtime="onnx") as running:
            kept["seen"] = await develop_all(running.address, REQUESTS)
    return kept["seen"]


def gateway(start, servers, **settings):
    given = {"runtime": "triton", "triton_url": ",".join(server.grpc_url for server in servers)} | settings
    return start(**given)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status_pb2.Status.FromString(details).details)
    return info.reason


async def both_up(running) -> None:
    await eventually(lambda: running.runtime.num_live == 2, PATIENCE_S)


async def test_kill_9_under_load_and_back_in_rotation(start, undisturbed):
    with triton_servers(2) as (one, other):
        async with gateway(start, (one, other)) as running, grpc.aio.insecure_channel(running.address) as channel:
            await both_up(running)
            load = Load(channel, REQUESTS)
            await eventually(load.reached(4), PATIENCE_S)
            before = [len(seen.previews) for seen in load.seen]
            assert load.num_running == len(REQUESTS)
            await asyncio.to_thread(one.kill)
            await eventually(lambda: running.runtime.num_live == 1, PATIENCE_S)
            assert_exact(REQUESTS, await load.finish(), undisturbed)
            assert all(len(seen.previews) > count for seen, count in zip(load.seen, before, strict=True))
            one.restart()
            await both_up(running)
            calls = running.runtime.endpoints
            load = Load(channel, REQUESTS)
            await eventually(lambda: calls.num_calls(0) > 0 and calls.num_calls(1) > 0, PATIENCE_S)
            assert_exact(REQUESTS, await load.finish(), undisturbed)


async def test_a_hung_server_is_given_up_and_its_late_answer_spoils_nothing(start, undisturbed):
    with triton_servers(2, "--restart") as (one, other):  # a continued server may abort: see deploy/triton/serve
        settings = {"triton_timeout_floor_s": 1.0, "triton_shared_memory": "on"}
        gate = gateway(start, (one, other), **settings)
        async with gate as running, grpc.aio.insecure_channel(running.address) as channel:
            await both_up(running)
            load = Load(channel, REQUESTS)
            await eventually(load.reached(4), PATIENCE_S)
            one.stop()
            await eventually(lambda: running.runtime.num_live == 1, PATIENCE_S)
            one.cont()
            assert_exact(REQUESTS, await load.finish(), undisturbed)
            await both_up(running)
            regions = [server.regions for server in running.runtime.servers]
            await eventually(lambda: not any(pool.num_quarantined for pool in regions), PATIENCE_S)


async def test_a_model_unloaded_under_load_is_used_elsewhere(start, undisturbed):
    with triton_servers(2, "--explicit") as (one, other):
        async with gateway(start, (one, other)) as running, grpc.aio.insecure_channel(running.address) as channel:
            await both_up(running)
            load = Load(channel, REQUESTS)
            await eventually(load.reached(4), PATIENCE_S)
            async with triton_grpc.InferenceServerClient(one.grpc_url) as operator:
                await operator.unload_model("icons_denoiser")
                await eventually(lambda: running.runtime.num_live == 1, PATIENCE_S)
                assert_exact(REQUESTS, await load.finish(), undisturbed)
                await operator.load_model("icons_denoiser")
                await both_up(running)


async def test_with_no_server_left_generations_wait_and_go_on_from_the_same_step(start, undisturbed):
    with triton_server() as only:
        settings = {"runtime_grace_s": 0.0, "runtime_wait_s": 120.0}
        async with gateway(start, [only], **settings) as running, grpc.aio.insecure_channel(running.address) as channel:
            load = Load(channel, REQUESTS)
            await eventually(load.reached(4), PATIENCE_S)
            await asyncio.to_thread(only.kill)
            await eventually(lambda: running.runtime.num_live == 0, PATIENCE_S)
            health = health_pb2_grpc.HealthStub(channel)
            refused = Load(channel, REQUESTS[:1])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused.finish()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert reason_of(caught.value) == "RUNTIME_UNAVAILABLE"
            status = health_pb2.HealthCheckResponse
            seen = []
            async for answer in health.Watch(health_pb2.HealthCheckRequest()):
                seen.append(answer.status)
                if answer.status == status.NOT_SERVING:
                    alive = health_pb2.HealthCheckRequest(service="grpc.health.v1.Health")
                    assert (await health.Check(alive)).status == status.SERVING, "to start it anew would help nobody"
                    only.restart()
                elif status.NOT_SERVING in seen:
                    break
            assert seen[-1] == status.SERVING
            assert_exact(REQUESTS, await load.finish(), undisturbed)


async def test_generations_that_wait_too_long_end_unavailable(start):
    with triton_server() as only:
        settings = {"runtime_grace_s": 60.0, "runtime_wait_s": 0.5}
        async with gateway(start, [only], **settings) as running, grpc.aio.insecure_channel(running.address) as channel:
            load = Load(channel, REQUESTS)
            await eventually(load.reached(2), PATIENCE_S)
            await asyncio.to_thread(only.kill)
            late = Load(channel, REQUESTS[:1])  # accepted within the grace period, for which it also waits
            for waiting in (load, late):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await waiting.finish()
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert reason_of(caught.value) == "RUNTIME_UNAVAILABLE"
            await eventually(lambda: not running.generations._live)
