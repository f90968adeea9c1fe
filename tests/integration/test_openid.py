"""Tokens of an OpenID provider against a real server: over gRPC, HTTP and gRPC-Web, with tenants, quotas and clients."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator

import grpc
import openai
import pytest
import safelight
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import models_pb2
from safelight_server.api import openid
from safelight_server.api.identity import new_key

from tests.integration.test_generate import reason_of
from tests.integration.test_grpc_web import GET_MODEL, call, frame, frames
from tests.support.http import GENERATIONS, body, client, http_server
from tests.support.openid_provider import OpenIdService, openid_service


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenIdService]:
    monkeypatch.setattr(openid, "TIMEOUT_S", 30.0)  # a slow machine is no outage
    with openid_service() as running:
        yield running


def trusting(service: OpenIdService, **more: object) -> dict[str, object]:
    """Settings of a server that accepts the provider's tokens."""
    return {"oidc_issuer": service.issuer, "oidc_audience": "safelight"} | more


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_a_key_and_a_token_work_on_grpc_and_http_alike(service, tmp_path):
    key, entry = new_key("game", "keyed")
    file = tmp_path / "keys.json"
    file.write_text(f'{{"keys": [{entry}]}}')
    async with http_server(**trusting(service, api_key_file=file)) as running:
        for credential in (key, service.token()):
            async with safelight.Client(running.address, api_key=credential) as ours:
                assert (await ours.generate("x", steps=1).picture()).data
            async with openai.AsyncOpenAI(base_url=f"http://{running.http_address}/v1", api_key=credential) as theirs:
                answer = await theirs.images.generate(prompt="x", extra_body={"num_inference_steps": 1})
                assert base64.b64decode(answer.data[0].b64_json)
        async with client(running) as http:
            for token, code, challenge in (
                ("unknown", "UNAUTHENTICATED", "Bearer"),
                (service.token(aud="elsewhere"), "TOKEN_INVALID", 'Bearer error="invalid_token"'),
                (service.token(exp=1), "TOKEN_EXPIRED", 'Bearer error="invalid_token"'),
            ):
                refused = await http.post(GENERATIONS, json=body(), headers=dict(bearer(token)))
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, code)
                assert refused.headers["www-authenticate"] == challenge
            refused = await http.post(GENERATIONS, json=body(), headers=dict(bearer(service.token(client_id="a b"))))
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "TOKEN_NOT_ALLOWED")


async def test_a_page_sends_a_token_as_a_key_by_grpc_web(service):
    request = frame(models_pb2.GetModelRequest(name="models/simulated").SerializeToString())
    async with http_server(**trusting(service)) as running:
        for token, known in ((service.token(), True), ("unknown", False)):
            response = await call(running, GET_MODEL, request, authorization=f"Bearer {token}")
            messages, trailers = frames(response.content)
            if known:
                [message] = messages
                assert models_pb2.GetModelResponse.FromString(message).model.name == "models/simulated"
            else:
                assert trailers["grpc-status"] == str(grpc.StatusCode.UNAUTHENTICATED.value[0])


async def test_generations_and_quotas_are_of_the_tenant_that_the_token_names(start, service, tmp_path):
    quotas = tmp_path / "quotas.json"
    quotas.write_text(json.dumps({"tenants": {"lab": {"requests": {"per_s": 0.001, "burst": 1}}}}))
    given = trusting(service, oidc_tenant_claim="org", oidc_admin="scope=admin", quota_file=quotas)
    ann, bob = service.token(org="lab"), service.token(org="studio", sub="bob")
    async with start(runtime="simulated", **given) as running:
        async with safelight.Client(running.address, api_key=ann, retries=0) as lab:
            first, *_ = [event async for event in lab.generate("x", steps=1)]
            name = first.generation
            with pytest.raises(safelight.GenerationError) as refused:
                await lab.generate("y", steps=1).picture()
            assert refused.value.reason == "REQUEST_RATE_EXCEEDED"
            assert (await lab.get(name)).name == name
            with pytest.raises(safelight.GenerationError) as refused:
                await lab.quotas()
            assert refused.value.reason == "ADMIN_ONLY"
        async with safelight.Client(running.address, api_key=bob) as studio:
            assert (await studio.generate("y", steps=1).picture()).data
            with pytest.raises(safelight.GenerationError) as refused:
                await studio.get(name)
            assert refused.value.reason == "GENERATION_NOT_FOUND"
        admin = service.token(org="ops", scope="read admin")
        async with safelight.Client(running.address, api_key=admin) as ops:
            assert {each.tenant for each in await ops.quotas()} == {"lab", "studio", "ops"}


async def test_a_stream_outlives_its_token_and_a_new_call_does_not(start, service):
    """A generation takes seconds; whoever was let in gets its picture."""
    late_s = 0.0
    metadata = bearer(service.token())
    slow = {"runtime": "simulated", "simulated_base_ms": 5.0}
    async with (
        start(wall=lambda: time.time() + late_s, **slow, **trusting(service)) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = stubs.GenerationServiceStub(channel)
        spec = pb.GenerationSpec(prompt="x", num_inference_steps=50, outputs=[{"seed": 1}])
        events = aiter(stub.Generate(pb.GenerateRequest(spec=spec), metadata=metadata))
        name = (await anext(events)).event.generation
        late_s = 120.0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetGeneration(pb.GetGenerationRequest(name=name), metadata=metadata)
        assert reason_of(refused.value) == "TOKEN_EXPIRED"
        *_, last = [answer.event async for answer in events]
        assert last.HasField("finished")
        renewed = bearer(service.token(exp=int(time.time()) + 180))
        found = await stub.GetGeneration(pb.GetGenerationRequest(name=name), metadata=renewed)
        assert found.generation.state == pb.Generation.STATE_SUCCEEDED


async def test_the_client_asks_for_a_token_for_each_call(start, service):
    asked: list[str] = []

    def fetch() -> str:
        asked.append(service.token(jti=f"{len(asked)}"))
        return asked[-1] + "\n"

    async def fetch_later() -> str:
        return fetch()

    async with start(runtime="simulated", **trusting(service)) as running:
        for source in (fetch, fetch_later, lambda: fetch_later()):
            before = len(asked)
            async with safelight.Client(running.address, token=source) as ours:
                assert (await ours.generate("x", steps=1).picture()).data
                assert await ours.models()
            assert len(asked) == before + 2
        sync = await asyncio.to_thread(safelight.SyncClient, running.address, token=fetch)
        assert await asyncio.to_thread(sync.models)
        await asyncio.to_thread(sync.close)


async def test_the_client_sends_no_token_that_is_no_header_value_and_reports_what_the_source_raises():
    with pytest.raises(ValueError, match="token: excludes api_key"):
        safelight.Client("127.0.0.1:1", api_key="k", token=lambda: "t")

    def fail() -> str:
        raise LookupError("no credentials")

    for source, error in ((lambda: "a b", ValueError), (lambda: "", ValueError), (fail, LookupError)):
        async with safelight.Client("127.0.0.1:1", token=source) as ours:
            with pytest.raises(error):
                await ours.models()
            with pytest.raises(error):
                await ours.generate("x").picture()


async def test_the_wait_for_a_token_ends_with_the_deadline_of_the_call():
    fetched = threading.Event()

    async def never() -> str:
        await asyncio.Event().wait()
        return "t"

    async def own_timeout() -> str:
        raise TimeoutError("of the source")

    try:
        for source in (never, lambda: never(), lambda: fetched.wait() and "t"):
            async with safelight.Client("127.0.0.1:1", token=source) as ours, asyncio.timeout(20):
                for given in ({}, {"init_image": b"a picture"}):
                    with pytest.raises(safelight.GenerationError) as late:
                        await ours.generate("x", timeout_s=0.05, **given).picture()
                    assert (late.value.code, late.value.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "")
    finally:
        fetched.set()
    async with safelight.Client("127.0.0.1:1", token=own_timeout) as ours:
        with pytest.raises(TimeoutError, match="of the source"):
            await ours.generate("x", timeout_s=30.0).picture()


async def test_a_client_that_moves_while_it_waits_for_a_token_fails_over_from_the_server_that_it_asked(start, service):
    moved: list[bool] = []

    async def fetch() -> str:
        if not moved:
            moved.append(True)
            ours._servers.move_on(0)  # as another call does that loses this server
        return service.token()

    async with (
        start(runtime="simulated", **trusting(service)) as running,
        safelight.Client([running.address, "127.0.0.1:1"], token=fetch) as ours,
    ):
        assert await ours.models()


async def test_a_server_starts_without_its_provider_and_serves_tokens_once_that_answers(start, service, monkeypatch):
    monkeypatch.setattr(openid, "PAUSE_S", 0.01)
    service.broken = True
    async with (
        start(runtime="simulated", **trusting(service)) as running,
        safelight.Client(running.address, api_key=service.token(), retries=0) as ours,
    ):
        with pytest.raises(safelight.GenerationError) as refused:
            await ours.models()
        assert (refused.value.code, refused.value.reason) == (
            grpc.StatusCode.UNAVAILABLE,
            "IDENTITY_PROVIDER_UNAVAILABLE",
        )
        assert refused.value.retry_after_s
        service.broken = False
        models = []
        async with asyncio.timeout(20):
            while not models:
                try:
                    models = await ours.models()
                except safelight.GenerationError as error:
                    assert error.reason == "IDENTITY_PROVIDER_UNAVAILABLE"
                    await asyncio.sleep(0.005)
