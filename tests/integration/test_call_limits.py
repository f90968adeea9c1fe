"""Limits on calls that no caller's quota covers: without a request, without a key, without a method."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import models_pb2, models_pb2_grpc
from safelight_server.api import call_limits
from safelight_server.app import grpc_server, listening
from safelight_server.generations.registry import Generations

from tests.conftest import eventually
from tests.integration.test_requests import SIMULATED, details, finishes, request
from tests.support.http2 import frame, header

GENERATE = "/safelight.v1.GenerationService/Generate"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
Serving = health_pb2.HealthCheckResponse


async def end_of(call) -> tuple[grpc.StatusCode, dict]:
    """The status of a call that failed, and its details by name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(15):  # otherwise a fault would hang the test
            async for _ in call:
                pass
    return caught.value.code(), details(caught.value)


def only_headers(channel, path: str):
    return channel.stream_stream(path)()


def watch(channel, service: str = ""):
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))


async def check(channel) -> int:
    return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status


@pytest.mark.parametrize(
    "path",
    [GENERATE, "/safelight.v1.ModelService/GetModel", WATCH, "/grpc.health.v1.Health/Check", REFLECT],
)
async def test_a_call_whose_request_does_not_come_is_ended(start, path):
    async with (
        start(**SIMULATED, request_wait_s=0.05) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        code, found = await end_of(only_headers(channel, path))
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "NO_REQUEST")
        running.limits._request_wait_s = 600.0
        assert await check(channel) == Serving.SERVING


async def test_a_reflection_stream_that_falls_silent_is_ended(start):
    async with (
        start(**SIMULATED, request_wait_s=600) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        call = only_headers(channel, REFLECT)
        await eventually(lambda: running.limits.num_awaited == 1)
        running.limits._request_wait_s = 0.05  # from the next request on
        await call.write(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
        code, found = await end_of(call)
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "NO_REQUEST")


async def test_a_watch_is_not_ended_for_want_of_further_requests(start):
    async with (
        start(**SIMULATED, request_wait_s=600) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        watching = watch(channel)
        assert (await watching.read()).status == Serving.SERVING
        running.limits._request_wait_s = 0.05
        await end_of(only_headers(channel, GENERATE))  # as long as the limit
        assert not watching.done()


async def test_of_too_many_calls_without_a_request_the_oldest_is_ended(start, monkeypatch):
    monkeypatch.setattr(call_limits, "MAX_AWAITED", 4)
    async with start(**SIMULATED, request_wait_s=600) as running, grpc.aio.insecure_channel(running.address) as channel:
        calls = []
        for num_awaited in (1, 2, 3, 4):
            calls.append(only_headers(channel, GENERATE))
            await eventually(lambda: running.limits.num_awaited == num_awaited)
        calls.append(only_headers(channel, GENERATE))
        code, found = await end_of(calls[0])
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        model = await models_pb2_grpc.ModelServiceStub(channel).ListModels(models_pb2.ListModelsRequest())
        assert model.models, "who sends a request is served"
        for call in calls:
            call.cancel()


@pytest.mark.parametrize("path", [GENERATE, "/safelight.v1.ModelService/GetModel", WATCH])
async def test_a_call_that_ends_without_a_request_is_invalid(start, path):
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        call = only_headers(channel, path)
        await call.done_writing()
        code, found = await end_of(call)
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_request_that_is_no_protobuf_is_invalid_for_health_too(start):
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        code, found = await end_of(channel.unary_stream(WATCH)(b"\xff" * 8))
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


@pytest.mark.parametrize("path", ["/safelight.v1.GenerationService/Nothing", "/no.such/Method", "/" + "x" * 4000])
async def test_a_method_that_is_not_there_is_told_with_a_reason(start, path):
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        code, found = await end_of(channel.unary_stream(path)(b""))
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD")


def headers_of(path: bytes) -> bytes:
    """The headers of a call, each as a literal without indexing."""
    pairs = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x", b"te": b"trailers"}
    pairs[b"content-type"] = b"application/grpc"
    return b"".join(header(name, value) for name, value in pairs.items())


@pytest.mark.parametrize("path", [b"/a/\xff\xfe", b"/\xc3(", b"", b"/\0", b"nothing", b"/safelight/unknown"])
async def test_no_path_ends_the_server(start, path):
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        host, _, port = running.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 5, 1, headers_of(path)))
        try:
            async with asyncio.timeout(15):
                await reader.readuntil(b"the server has no method of this name")
                assert await check(channel) == Serving.SERVING
        finally:
            writer.close()


async def test_the_streams_of_an_address_that_need_no_key_are_bounded(start):
    async with (
        start(**SIMULATED, max_keyless_streams_per_address=2) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        watching = [watch(channel, service) for service in ("", "no.such.Service")]
        told = [(await call.read()).status for call in watching]
        assert told == [Serving.SERVING, Serving.SERVICE_UNKNOWN]
        for path in (WATCH, REFLECT):
            code, found = await end_of(only_headers(channel, path))
            assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
            assert found["QuotaFailure"].violations[0].subject == "address 127.0.0.1"
        assert await check(channel) == Serving.SERVING, "a check is no stream"
        watching[0].cancel()
        while (again := watch(channel)) and await again.read() is grpc.aio.EOF:
            pass
        assert not again.done(), "a stream that has ended makes room"


async def test_a_connection_opens_a_bounded_number_of_calls(start, monkeypatch):
    monkeypatch.setattr(
        grpc_server, "OPTIONS", [*(dict(grpc_server.OPTIONS) | {"grpc.max_concurrent_streams": 1}).items()]
    )
    async with start(**SIMULATED) as running:
        own = (("grpc.use_local_subchannel_pool", 1),)
        async with (
            grpc.aio.insecure_channel(running.address, options=own) as channel,
            grpc.aio.insecure_channel(running.address, options=own) as other,
        ):
            watching = watch(channel)
            await watching.read()
            waiting = asyncio.create_task(check(channel))
            assert await check(other) == Serving.SERVING
            assert not waiting.done()
            watching.cancel()
            assert await waiting == Serving.SERVING


async def test_a_server_has_a_bounded_number_of_connections(start):
    async with start(**SIMULATED, max_connections=1) as running:
        own = (("grpc.use_local_subchannel_pool", 1),)
        async with (
            grpc.aio.insecure_channel(running.address, options=own) as channel,
            grpc.aio.insecure_channel(running.address, options=own) as other,
        ):
            assert await check(channel) == Serving.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(other)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert await check(channel) == Serving.SERVING


async def test_a_drain_ends_calls_whose_request_has_not_come(start):
    async with start(**SIMULATED, request_wait_s=600) as running, grpc.aio.insecure_channel(running.address) as channel:
        silent, watching = only_headers(channel, GENERATE), aiter(watch(channel))
        await anext(watching)
        await eventually(lambda: running.limits.num_awaited == 1)
        drained = running.drain(0)
        code, found = await end_of(silent)
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        code, found = await end_of(watching)
        assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        await drained


async def test_whoever_asks_for_the_next_picture_while_the_server_stops_is_told_so(start, monkeypatch):
    """gRPC itself would end a call after the stop as CANCELLED, without a reason."""
    monkeypatch.setattr(call_limits, "QUIET_S", 600.0)
    monkeypatch.setattr(call_limits, "QUIET_PARTS", 60_000)
    monkeypatch.setattr(listening, "LAST_WORDS_S", 60.0)
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        call = stub.Generate(request())
        await anext(aiter(call))
        drained = running.drain(60.0)
        assert await finishes(call)
        for _ in range(20):
            code, found = await end_of(stub.Generate(request()))
            assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            await asyncio.sleep(0.01)
        await asyncio.gather(drained, running.drain(0.0))


async def test_a_server_that_nobody_asks_stops_without_a_wait(start, monkeypatch):
    monkeypatch.setattr(call_limits, "QUIET_S", 600.0)
    monkeypatch.setattr(listening, "LAST_WORDS_S", 60.0)
    async with start(**SIMULATED) as running, asyncio.timeout(30):
        await running.drain(3600.0)


async def forever(*_given: object, **_named: object) -> None:
    await asyncio.Event().wait()


async def given_up(*_given: object, **_named: object) -> None:
    """Fails as if something that several calls share had been cancelled."""
    nothing = asyncio.get_running_loop().create_future()
    nothing.cancel()
    await nothing


def get_generation(channel, timeout_s: float | None = None):
    missing = pb.GetGenerationRequest(name="generations/" + "0" * 32)
    return stubs.GenerationServiceStub(channel).GetGeneration(missing, timeout=timeout_s)


async def test_a_call_that_outlasts_a_drain_is_told_that_the_server_stops(start, monkeypatch):
    monkeypatch.setattr(Generations, "find", forever)
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        call = get_generation(channel)
        await eventually(lambda: running.limits.num_open == 1)
        drained = running.drain(0.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(caught.value)["ErrorInfo"].reason == "DRAINING"
        await drained
        await eventually(lambda: not running.limits.num_open)


async def test_a_call_that_is_given_up_within_the_server_ends_with_a_reason(start, monkeypatch):
    monkeypatch.setattr(Generations, "find", given_up)
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get_generation(channel, timeout_s=15.0)  # grpc would let it wait without a limit
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert details(caught.value)["ErrorInfo"].reason == "INTERNAL"
        assert not running.limits.num_open


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services_and_their_files_with_json_names(start, version):
    async with start(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = [service.name for service in (await call.read()).list_services_response.service]
        assert names == sorted(names)
        assert {"safelight.v1.GenerationService", "grpc.health.v1.Health"} < set(names)
        assert {"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"} < set(names)
        for name in names:
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
            serialized = (await call.read()).file_descriptor_response.file_descriptor_proto
            files = [descriptor_pb2.FileDescriptorProto.FromString(data) for data in serialized]
            package, _, service = name.rpartition(".")
            assert any(file.package == package and service in [s.name for s in file.service] for file in files), name
            fields = [field for file in files for message in file.message_type for field in message.field]
            assert all(field.json_name and "_" not in field.json_name for field in fields)
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Service"))
        assert (await call.read()).error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        call.cancel()
