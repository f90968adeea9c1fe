"""The port of probes: gRPC health in plain text beside a server that speaks TLS and asks for keys."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safelight.v1 import models_pb2, models_pb2_grpc
from safelight_server.app.errors import StartError
from safelight_server.settings import SettingsError, load

from load_tests.ports import free_port
from tests.support.certificates import self_signed

SERVING = health_pb2.HealthCheckResponse.SERVING


async def test_probes_need_no_tls_and_no_key_and_reach_nothing_else(start, tmp_path):
    certificate, key = self_signed(tmp_path)
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": []}')
    port = free_port()
    settings = {"tls_cert_file": certificate, "tls_key_file": key, "api_key_file": keys, "probe_port": port}
    async with (
        start(runtime="simulated", **settings) as running,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await models_pb2_grpc.ModelServiceStub(channel).ListModels(models_pb2.ListModelsRequest())
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED

        watching = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == SERVING
        await running.drain(10.0)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while await watching.read():
                pass
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_probe_port_that_cannot_be_had_is_named(start):
    port = free_port()
    async with start(runtime="simulated", probe_port=port):
        with pytest.raises(StartError, match=f"probe_port: cannot bind 127.0.0.1:{port}"):
            async with start(runtime="simulated", probe_port=port):
                pass
    with pytest.raises(SettingsError, match="probe_port must differ from port and http_port"):
        load(port=8421, probe_port=8421)
    with pytest.raises(SettingsError, match="probe_port needs a host that is not a unix socket"):
        load(host="unix:/tmp/x", probe_port=8421)
