"""HTTP through the activator: the OpenAI package, gRPC-Web and the contact sheet, with real replicas behind it."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from safelight.v1 import models_pb2
from safelight_server.activator.connector import Connector
from safelight_server.activator.http_app import API
from safelight_server.api.identity import new_key
from safelight_server.app.certificate import ServerCertificate
from safelight_server.http.server import HttpServer
from starlette.routing import Route

from load_tests.ports import free_port
from tests.conftest import eventually
from tests.integration.test_images import PHOTO
from tests.support.activation import Activation, activation, calling, grpc_replica, http_replica, its_address
from tests.support.certificates import NAME, new_pair, self_signed
from tests.support.http import GENERATIONS, body, http_server

LONG = {"num_inference_steps": 1000}
PNG = b"\x89PNG"


@asynccontextmanager
async def package(here: Activation, api_key: str = "none") -> AsyncIterator[AsyncOpenAI]:
    """The OpenAI package, which asks the activator, and asks once."""
    without_proxy = httpx2.AsyncClient(trust_env=False)
    url = f"http://{here.http_address}/v1"
    async with AsyncOpenAI(base_url=url, api_key=api_key, http_client=without_proxy, max_retries=0) as client:
        yield client


@asynccontextmanager
async def browser(here: Activation, **options: object) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the activator's HTTP."""
    async with httpx2.AsyncClient(
        base_url=f"http://{here.http_address}", trust_env=False, timeout=30, **options
    ) as http:
        yield http


@pytest.fixture
async def fleet() -> AsyncIterator[tuple[Activation, object]]:
    """An activator without a replica, and a server that a test makes its replica."""
    async with http_server() as server:
        port = int(server.http_address.rpartition(":")[2])
        async with activation(http_port=port) as here:
            yield here, server


async def test_a_stream_of_the_openai_package_is_held_and_then_comes_as_it_is_made(fleet):
    here, server = fleet
    async with package(here) as client:
        asked = asyncio.create_task(
            client.images.generate(prompt="a key", stream=True, partial_images=2, extra_body={"num_inference_steps": 8})
        )
        await eventually(lambda: here.held() == 1)
        assert not asked.done()
        here.names.addresses = frozenset({server.address})
        events = [event async for event in await asked]
        assert events[-1].type == "image_generation.completed"
        assert base64.b64decode(events[-1].b64_json).startswith(PNG)
        assert here.held() == 0


async def test_an_event_comes_before_the_next_is_made_and_who_leaves_cancels(fleet):
    here, server = fleet
    await here.has(server.address)
    async with package(here) as client:
        stream = await client.images.generate(prompt="a key", stream=True, partial_images=3, extra_body=LONG)
        first = await anext(aiter(stream))
        assert first.type == "image_generation.partial_image"
        assert server.inspect().live == 1, "it is still being made"
        await stream.close()
        await eventually(lambda: not server.inspect().live)
        assert not server.inspect().suspended


async def test_who_leaves_is_held_no_longer(fleet):
    here, _ = fleet
    async with package(here) as client:
        asked = asyncio.create_task(client.images.generate(prompt="a key"))
        await eventually(lambda: here.held() == 1)
        asked.cancel()
        await eventually(lambda: here.held() == 0)


async def test_pictures_edits_models_and_errors_are_those_of_the_replica(fleet):
    here, server = fleet
    await here.has(server.address)
    async with package(here) as client:
        few = {"num_inference_steps": 2, "seed": 3}
        through = await client.images.generate(prompt="a key", n=2, size="128x128", extra_body=few)
        assert len(through.data) == 2
        url = f"http://{server.http_address}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", http_client=httpx2.AsyncClient(trust_env=False)) as direct:
            same = await direct.images.generate(prompt="a key", n=2, size="128x128", extra_body=few)
        assert [picture.b64_json for picture in same.data] == [picture.b64_json for picture in through.data]
        edited = await client.images.edit(image=("a.png", PHOTO), prompt="a key", size="128x128", extra_body=few)
        assert base64.b64decode(edited.data[0].b64_json).startswith(PNG)
        assert [model.id async for model in client.models.list()] == ["simulated"]
        assert (await client.models.retrieve("simulated")).id == "simulated"
        with pytest.raises(openai.BadRequestError) as refused:
            await client.images.generate(prompt="x", style="vivid")
        assert (refused.value.param, refused.value.code) == ("style", "INVALID_REQUEST")
    async with browser(here) as http:
        response = await http.head("/v1/models")
        assert (response.status_code, response.content) == (200, b"")
        assert len(response.headers.get_list("date")) == 1


async def test_a_request_is_not_held_for_ever_and_the_error_has_the_form_of_openai():
    async with activation(hold_s=0.01) as here, package(here) as client:
        with pytest.raises(openai.InternalServerError) as late:
            await client.images.generate(prompt="a key")
        assert (late.value.status_code, late.value.code, late.value.type) == (
            503,
            "RUNTIME_UNAVAILABLE",
            "server_error",
        )
        assert late.value.response.headers["retry-after"] == "5"


async def test_no_more_requests_are_held_than_may_be():
    async with activation(max_held=1) as here, package(here) as client:
        first = asyncio.create_task(client.images.generate(prompt="a key"))
        await eventually(lambda: here.held() == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.images.generate(prompt="a key")
        assert refused.value.code == "TOO_MANY_CALLS"
        assert refused.value.response.headers["retry-after"] == "5"
        async with calling(here.address) as list_models:
            with pytest.raises(Exception, match="1 calls wait"):
                await list_models(b"")
        here.room.drain()
        with pytest.raises(openai.InternalServerError) as ended:
            await first
        assert ended.value.code == "DRAINING"


async def test_a_deadline_ends_what_is_held():
    async with activation() as here, browser(here) as http:
        late = await http.post(GENERATIONS, json=body(), headers={"grpc-timeout": "20m"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
        assert here.held() == 0


async def test_forms_that_are_held_have_room_together():
    form = {"content-type": "multipart/form-data; boundary=x"}
    async with activation() as here, browser(here, headers=form) as http:

        def edit(num_bytes: int):
            return asyncio.create_task(http.post("/v1/images/edits", content=bytes(num_bytes)))

        held = [edit(1_000_000) for _ in range(4)]  # of 4 MiB that there are for a tenant
        await eventually(lambda: here.held() == 4)
        async with asyncio.timeout(15.0):  # it would be held
            refused = await edit(1_000_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "TOO_MANY_UPLOADS")
        assert (await edit(1 << 21)).status_code == 413
        for task in held:
            task.cancel()
        await eventually(lambda: here.held() == 0)


async def test_strangers_and_the_page_wake_nobody(tmp_path):
    key, entry = new_key("me", "studio")
    (tmp_path / "keys.json").write_text(f'{{"keys": [{entry}]}}')
    async with activation(tmp_path / "keys.json", cors_origins=["https://studio.example"]) as here:
        async with package(here, "another") as stranger:
            for asked in (
                stranger.images.generate(prompt="a key"),
                stranger.images.edit(image=("a.png", PHOTO), prompt="a key"),
                stranger.models.retrieve("simulated"),
            ):
                with pytest.raises(openai.AuthenticationError):
                    await asked
        page = {"origin": "https://studio.example"}
        async with browser(here) as http:
            sheet = await http.get("/")
            assert "<script" in sheet.text
            assert (await http.get("/page/page.css")).status_code == 200
            assert (await http.get("/healthz")).json() == {"status": "serving"}
            known = {"authorization": f"Bearer {key}"}
            assert (await http.get("/v1/nothing", headers=known)).status_code == 404
            preflight = page | {"access-control-request-method": "POST"}
            assert (await http.options(GENERATIONS, headers=preflight)).status_code == 200
            refused = await http.post(GENERATIONS, json=body(), headers=page)
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://studio.example"
        assert here.held() == 0


async def test_grpc_web_is_held_too(fleet):
    here, server = fleet
    empty = struct.pack(">BL", 0, 0)
    web = {"content-type": "application/grpc-web+proto"}
    async with browser(here, headers=web) as http:
        path = "/safelight.v1.ModelService/ListModels"
        asked = asyncio.create_task(http.post(path, content=empty))
        await eventually(lambda: here.held() == 1)
        here.names.addresses = frozenset({server.address})
        response = await asked
        _, length = struct.unpack_from(">BL", response.content)
        listed = models_pb2.ListModelsResponse.FromString(response.content[5 : 5 + length])
        assert [model.name for model in listed.models] == ["models/simulated"]
        assert b"grpc-status: 0" in response.content[5 + length :]
    async with activation(hold_s=0.01) as nobody, browser(nobody, headers=web) as http:
        response = await http.post(path, content=empty)
        assert (response.status_code, response.content[0]) == (200, 0x80)
        assert b"grpc-status: 14" in response.content


def paths(app: object) -> set[str]:
    routes = app._app.routes  # type: ignore[attr-defined]  # Starlette's, behind `Front`
    return {route.path for route in routes if isinstance(route, Route)}


async def test_it_has_the_paths_of_a_replica(monkeypatch):
    """What a replica has beyond these would be refused by the activator."""
    built, start = [], HttpServer.start

    async def seen(app, *more):
        built.append(app)
        return await start(app, *more)

    monkeypatch.setattr(HttpServer, "start", seen)
    async with http_server(), activation():
        replica, activator = map(paths, built)
        assert replica == activator
        assert {path for _, path in API} < activator


# --- connections ---


async def test_a_replica_with_mtls_sees_one_handshake_of_grpc_and_one_of_http(tmp_path, monkeypatch):
    """Whatever the number of calls; and a new one when the activator's certificate is renewed."""
    handshakes, newest = [], ServerCertificate.newest
    monkeypatch.setattr(ServerCertificate, "newest", lambda self: handshakes.append(1) or newest(self))
    cert, private = self_signed(tmp_path)
    first, second = new_pair("activator.example"), new_pair("activator.example")
    own, authorities = tmp_path / "own.pem", tmp_path / "authorities.pem"
    own.write_bytes(first[0] + first[1])
    authorities.write_bytes(first[0] + second[0])
    async with http_server(tls_cert_file=cert, tls_key_file=private, tls_client_ca_file=authorities) as server:
        connector = Connector(cert, own, NAME, int(server.http_address.rpartition(":")[2]))
        async with activation(connector=connector) as here, browser(here) as http, calling(here.address) as list_models:
            handshakes.clear()
            await here.has(server.address)
            for _ in range(10):
                assert await list_models(b"")
                assert (await http.get("/v1/models")).status_code == 200
            assert len(handshakes) == 2
            authorities.write_bytes(second[0])
            own.write_bytes(second[0] + second[1])
            await eventually(lambda: len(handshakes) > 2)
            assert await list_models(b"")
            assert (await http.get("/v1/models")).status_code == 200


async def test_a_request_that_no_replica_has_begun_to_answer_is_tried_on_another():
    """One of them answers no HTTP; it is asked first by one of two requests."""
    port, answered = free_port(), []

    async def answer(_reader, writer):
        answered.append(1)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()

    async with AsyncExitStack() as ends:
        here = await ends.enter_async_context(activation(http_port=port))
        http = await ends.enter_async_context(browser(here))
        able = await ends.enter_async_context(http_replica(answer, port, "127.0.0.2"))
        unable = await ends.enter_async_context(grpc_replica(its_address, "127.0.0.3"))
        for _ in range(2):
            await here.has(able.address, unable.address)
            response = await http.get("/v1/models")
            assert (response.status_code, response.text) == (200, "ok")
        assert len(answered) == 2
        await here.has(unable.address)
        alone = await http.get("/v1/models")
        assert (alone.status_code, alone.headers["retry-after"]) == (503, "5")


async def test_a_refusal_is_tried_on_another_replica_once_and_then_passed_on():
    port, asked = free_port(), []

    async def refuse(_reader, writer):
        asked.append(1)
        answer = b'{"error": {"code": "RUNTIME_UNAVAILABLE"}}'
        head = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 7\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(answer) + answer)
        await writer.drain()

    async with AsyncExitStack() as ends:
        here = await ends.enter_async_context(activation(http_port=port))
        http = await ends.enter_async_context(browser(here))
        replicas = [await ends.enter_async_context(http_replica(refuse, port, f"127.0.0.{at}")) for at in (2, 3, 4)]
        for number, num_tries in ((1, 1), (3, 2)):
            await here.has(*(replica.address for replica in replicas[:number]))
            asked.clear()
            response = await http.get("/v1/models")
            assert (response.status_code, response.headers["retry-after"]) == (503, "7")
            assert response.json()["error"]["code"] == "RUNTIME_UNAVAILABLE"
            assert len(asked) == num_tries


async def test_a_request_reaches_the_replica_as_it_is_with_the_time_that_is_left():
    port = free_port()

    async def answer(_reader, writer):
        writer.write(
            b"HTTP/1.1 201 Created\r\nconnection: close\r\nx-made: 1\r\nx-made: 2\r\ncontent-length: 0\r\n\r\n"
        )
        await writer.drain()

    async with activation(http_port=port) as here, browser(here) as http, http_replica(answer, port) as replica:
        await here.has(replica.address)
        own = {"grpc-timeout": "30S", "x-own": "me", "connection": "x-hop", "host": "localhost:1"}
        response = await http.get("/v1/models/a%20b?c=d%20e", headers=own)
        assert (response.status_code, response.headers["x-made"]) == (201, "1, 2")
        line, *lines = replica.heads[0].decode().split("\r\n")
        assert line == "GET /v1/models/a%20b?c=d%20e HTTP/1.1"
        headers = dict(each.lower().split(": ", 1) for each in lines if each)
        assert (headers["x-own"], headers["host"]) == ("me", "localhost:1")
        assert 0 < int(headers["grpc-timeout"].removesuffix("m")) <= 30_000
        assert "connection" not in headers


async def test_an_answer_that_is_cut_off_is_seen_to_be():
    port = free_port()

    async def cut(_reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await writer.drain()

    async with activation(http_port=port) as here, browser(here) as http, http_replica(cut, port) as replica:
        await here.has(replica.address)
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.get("/v1/models")


async def test_a_replica_is_read_no_faster_than_the_client_reads():
    """A client that reads nothing, and a replica that would send more than all buffers on the way can take."""
    port, num_sent, at = free_port(), 0, 0.0
    piece, whole = bytes(1 << 16), 128 << 20

    async def send(_reader, writer):
        nonlocal num_sent, at
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % whole)
        while num_sent < whole:
            writer.write(piece)
            await writer.drain()
            num_sent += len(piece)
            at = asyncio.get_running_loop().time()

    async with activation(http_port=port) as here, http_replica(send, port) as replica:
        await here.has(replica.address)
        host, _, number = here.http_address.partition(":")
        _, writer = await asyncio.open_connection(host, int(number), limit=1 << 10)
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
        still = lambda: num_sent and asyncio.get_running_loop().time() - at > 0.5  # noqa: E731
        await eventually(lambda: still() or num_sent == whole)
        assert num_sent < whole
        writer.transport.abort()
        await eventually(lambda: all(each.transport.is_closing() for each in replica.connections))
