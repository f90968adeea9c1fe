"""HTTP against a real server: pictures, streams, refusals, and clients that are slow, large, late or gone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json

import grpc
import httpx2
import pytest
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.api.identity import new_key
from safelight_server.app.errors import StartError
from safelight_server.http import calls as http_calls
from safelight_server.http import server as http_listener
from safelight_server.http.images import ImageAnswer

from load_tests.ports import free_port
from tests.conftest import eventually
from tests.support.http import (
    GENERATIONS,
    SIMULATED,
    body,
    client,
    http_server,
    post,
    raw_connection,
    server_sent,
)
from tests.support.pause import steps_paused

PNG, JPEG = b"\x89PNG", b"\xff\xd8"


@pytest.fixture
async def server():
    async with http_server() as running:
        yield running


def error_of(response: httpx2.Response) -> dict[str, object]:
    return response.json()["error"]


async def over_grpc(running, seed: int) -> bytes:
    """The picture of `body()` with this seed."""
    spec = pb.GenerationSpec(prompt="a red potion", num_inference_steps=4, outputs=[pb.OutputSpec(seed=seed)])
    async with grpc.aio.insecure_channel(running.address) as channel:
        call = stubs.GenerationServiceStub(channel).Generate(pb.GenerateRequest(spec=spec))
        return b"".join([answer.event.artifact_chunk.data async for answer in call])


# --- pictures ---


async def test_a_picture_is_the_one_that_grpc_gives(server):
    async with client(server) as http:
        response = await http.post(GENERATIONS, json=body(n=2, seed=7, size="128x128", user="ann"))
    assert response.status_code == 200
    answer = response.json()
    pictures = [base64.b64decode(one["b64_json"]) for one in answer["data"]]
    assert pictures == [await over_grpc(server, 7), await over_grpc(server, 8)]
    assert (answer["size"], answer["output_format"], answer["background"]) == ("128x128", "png", "opaque")
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + 2 * 16 * 16
    more = answer["safelight"]
    assert (more["seeds"], more["cache"], more["model"]) == ([7, 8], ["MISS", "MISS"], "simulated")
    assert not server.inspect().live
    assert len(server.streams) == 0


async def test_a_stream_has_the_first_step_and_later_ones_and_the_picture(server):
    asked = body(stream=True, partial_images=3, num_inference_steps=200, output_format="jpeg", seed=7)
    async with client(server) as http:
        response = await http.post(GENERATIONS, json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *partial, (last, completed) = server_sent(response.text)
    assert [name for name, _ in partial] == ["image_generation.partial_image"] * len(partial)
    assert [event["partial_image_index"] for _, event in partial] == list(range(len(partial)))
    assert 1 <= len(partial) <= 3
    assert last == completed["type"] == "image_generation.completed"
    for _, event in [*partial, (last, completed)]:
        assert base64.b64decode(event["b64_json"]).startswith(JPEG)
        assert (event["size"], event["quality"], event["output_format"]) == ("128x128", "auto", "jpeg")
    assert completed["usage"]["output_tokens"] == 16 * 16
    assert completed["safelight"]["seeds"] == [7]


async def test_a_stream_is_never_silent_for_long(server, monkeypatch):
    """Proxies close silent connections."""
    monkeypatch.setattr("safelight_server.http.images.SILENCE_S", 0.0)
    async with client(server) as http:
        response = await http.post(GENERATIONS, json=body(stream=True))
    assert response.text.startswith(":\n\n")
    assert [name for name, _ in server_sent(response.text)] == ["image_generation.completed"]


async def test_the_next_generation_comes_over_the_same_connection(server):
    async with client(server, limits=httpx2.Limits(max_connections=1)) as http:
        for stream in (False, True, False):
            assert (await http.post(GENERATIONS, json=body(stream=stream))).status_code == 200


async def test_a_stream_may_have_several_pictures(server):
    """Each has its index, and the sum of all events' usages is that of the answer without a stream."""
    asked = body(n=3, seed=7, num_inference_steps=30)
    async with client(server) as http:
        answer = (await http.post(GENERATIONS, json=asked)).json()
        events = server_sent((await http.post(GENERATIONS, json=asked | {"stream": True, "partial_images": 1})).text)
    for index in range(3):
        [completed] = [e for name, e in events if name == "image_generation.completed" and e["image_index"] == index]
        assert completed["b64_json"] == answer["data"][index]["b64_json"]
        partial = [e for name, e in events if name == "image_generation.partial_image" and e["image_index"] == index]
        assert [event["partial_image_index"] for event in partial] == list(range(len(partial)))
        assert len(partial) <= 1
    usages = [event["usage"] for name, event in events if name == "image_generation.completed"]
    for count in ("input_tokens", "output_tokens", "total_tokens"):
        assert sum(usage[count] for usage in usages) == answer["usage"][count]
    assert ["safelight" in event for name, event in events if name == "image_generation.completed"] == [
        False,
        False,
        True,
    ]


# --- the same request, sent again ---


async def test_the_same_key_attaches_to_the_same_generation(server):
    """Also without a seed, which the server then chooses."""
    key = {"idempotency-key": "order 66"}
    async with client(server) as http:
        one, other = await asyncio.gather(*(http.post(GENERATIONS, json=body(n=2), headers=key) for _ in range(2)))
        late = await http.post(GENERATIONS, json=body(n=2), headers=key)
        first = one.json()
        for again in (other.json(), late.json()):
            assert again["data"] == first["data"]
            assert again["safelight"]["generation"] == first["safelight"]["generation"]
        assert max(first["safelight"]["seeds"]) < 2**53
        plain = (await http.post(GENERATIONS, json=body(n=2))).json()
        assert plain["safelight"]["seeds"] != first["safelight"]["seeds"]
    assert server.inspect().finished == 2


async def test_a_key_of_another_request_is_refused(server):
    async with client(server) as http:
        key = {"idempotency-key": "k" * 255}
        assert (await http.post(GENERATIONS, json=body(), headers=key)).status_code == 200
        response = await http.post(GENERATIONS, json=body(prompt="a blue sword"), headers=key)
        assert (response.status_code, error_of(response)["code"]) == (409, "REQUEST_ID_REUSED")
        assert "Idempotency-Key" in error_of(response)["message"]
        assert response.headers["x-should-retry"] == "false"
        for bad in ("", "k" * 256):
            response = await http.post(GENERATIONS, json=body(), headers={"idempotency-key": bad})
            assert (response.status_code, error_of(response)["param"]) == (400, "header idempotency-key")


async def test_who_leaves_with_a_key_may_come_back(server):
    """The work so far is kept; without an idempotency key it would be cancelled at once."""
    asked, key = body(num_inference_steps=300, seed=3), "idempotency-key: back\r\n"
    async with raw_connection(server) as (_, writer):
        writer.write(post(server, asked).replace(b"content-type", key.encode() + b"content-type", 1))
        await eventually(lambda: bool(server.inspect().live))
    await eventually(lambda: server.inspect().suspended == 1)
    async with client(server) as http:
        response = await http.post(GENERATIONS, json=asked, headers={"idempotency-key": "back"})
    assert base64.b64decode(response.json()["data"][0]["b64_json"]).startswith(PNG)
    assert server.inspect().finished == 1


# --- refusals ---


async def test_refusals_have_openais_form_and_our_reason(server):
    async with client(server) as http:
        response = await http.post(GENERATIONS, json=body(model="gpt-image-1"))
        assert response.status_code == 404
        error = error_of(response)
        assert (error["code"], error["param"], error["type"]) == ("MODEL_NOT_FOUND", "model", "not_found_error")
        assert "models/simulated" in error["message"]
        response = await http.post(GENERATIONS, json=body(style="vivid", stream=True))
        assert (response.status_code, error_of(response)["param"]) == (400, "style")


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/v1/nothing", {}, 404),
        ("GET", GENERATIONS, {}, 405),
        ("POST", GENERATIONS, {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ("POST", GENERATIONS, {"content": b"{}"}, 415),
        ("POST", GENERATIONS, {"json": {"prompt": "x" * 200_000}}, 413),
        ("GET", "/v1/models/none", {}, 404),
        ("POST", GENERATIONS, {"json": {}}, 400),
        ("POST", GENERATIONS, {"json": {"prompt": "x"}, "headers": {"grpc-timeout": "soon"}}, 400),
    ],
)
async def test_every_refusal_is_json(server, method, path, options, status):
    async with client(server) as http:
        response = await http.request(method, path, **options)
    assert response.status_code == status
    assert error_of(response)["code"]
    assert error_of(response)["message"]
    assert response.headers["date"]


async def test_a_wrong_path_or_method_says_what_there_is(server):
    async with client(server) as http:
        missing, refused = await http.get("/v1/nothing"), await http.get(GENERATIONS)
    assert error_of(missing)["message"] == "there is nothing at this path; docs/http.md lists those of this server"
    assert error_of(refused)["message"] == "use POST at this path"
    assert refused.headers["allow"] == "POST"


async def test_a_body_without_a_length_is_bounded_too(server, monkeypatch):
    monkeypatch.setattr(http_calls, "BODY_S", 5.0)  # otherwise a failing test would take long
    async with raw_connection(server) as (reader, writer):
        head = post(server, {}).partition(b"content-length")[0] + b"transfer-encoding: chunked\r\n\r\n"
        writer.write(head + b"20000\r\n" + b"x" * 0x20000)
        assert b" 413 " in await reader.readline()


async def test_keys_are_those_of_grpc(tmp_path):
    key, entry = new_key("ann", "studio")
    keys = tmp_path / "keys.json"
    keys.write_text(f'{{"keys": [{entry}]}}')
    async with http_server(api_key_file=keys) as running, client(running) as http:
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {key}"}):
            for path in ("/v1/models", GENERATIONS, "/v1/images/edits"):
                method = "GET" if path == "/v1/models" else "POST"
                response = await http.request(method, path, headers=headers)
                assert (response.status_code, error_of(response)["code"]) == (401, "UNAUTHENTICATED")
                assert response.headers["www-authenticate"] == "Bearer"
        good = {"authorization": f"Bearer {key}", "host": "pictures.example"}
        assert (await http.post(GENERATIONS, json=body(), headers=good)).status_code == 200
        assert (await http.get("/healthz")).json() == {"status": "serving"}


async def test_a_server_that_trusts_its_machine_answers_only_to_its_name(server):
    """Otherwise a page could let its own name resolve to this machine (DNS rebinding) and have the same origin."""
    async with client(server) as http:
        for host, status in [("evil.example", 421), ("evil.example:80", 421), ("", 421), ("localhost:80", 200)]:
            response = await http.get("/v1/models", headers={"host": host})
            assert response.status_code == status, host
        assert (await http.get("/v1/models", headers={"host": "[::1]"})).status_code == 200


async def test_pages_of_other_origins_are_asked_about(server):
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    preflight["access-control-request-headers"] = "authorization,content-type,x-stainless-os"
    async with client(server) as http:
        response = await http.options(GENERATIONS, headers=preflight)
        assert "access-control-allow-origin" not in response.headers
    origins = "https://app.example, http://localhost:3000"
    async with http_server(http_cors_origins=origins) as running, client(running) as http:
        response = await http.options(GENERATIONS, headers=preflight)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (
            200,
            "https://app.example",
        )
        response = await http.options(GENERATIONS, headers=preflight | {"origin": "https://evil.example"})
        assert response.status_code == 400
        response = await http.post(GENERATIONS, json={}, headers={"origin": "https://app.example"})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (
            400,
            "https://app.example",
        )


async def test_a_full_queue_says_when_to_come_back():
    narrow = {"max_running_outputs": 1, "max_waiting_per_caller": 1, "simulated_base_ms": 50}
    async with http_server(**narrow) as running, client(running) as http:
        asked = [
            asyncio.create_task(http.post(GENERATIONS, json=body(num_inference_steps=100, prompt=text)))
            for text in "ab"
        ]
        await eventually(lambda: running.inspect().live == 2)
        response = await http.post(GENERATIONS, json=body(prompt="c"))
        assert response.status_code == 429
        assert error_of(response)["code"] == "QUEUE_FULL"
        assert int(response.headers["retry-after"]) >= 1
        for one in asked:
            one.cancel()
        await eventually(lambda: not running.inspect().live)


async def test_streams_of_a_caller_are_bounded_with_those_of_grpc():
    async with http_server(max_streams_per_caller=1) as running:
        caller = {"safelight-caller": "ann"}
        async with grpc.aio.insecure_channel(running.address) as channel, client(running) as http:
            spec = pb.GenerationSpec(prompt="x", num_inference_steps=1000)
            metadata = tuple(caller.items())
            call = stubs.GenerationServiceStub(channel).Generate(pb.GenerateRequest(spec=spec), metadata=metadata)
            await call.read()
            response = await http.post(GENERATIONS, json=body(), headers=caller)
            assert (response.status_code, error_of(response)["code"]) == (429, "TOO_MANY_STREAMS")
            call.cancel()


# --- deadlines, and clients that leave ---


async def test_a_deadline_that_cannot_be_met_computes_nothing(server):
    async with client(server) as http:
        response = await http.post(GENERATIONS, json=body(num_inference_steps=1000), headers={"grpc-timeout": "900m"})
    assert (response.status_code, error_of(response)["code"]) == (504, "DEADLINE_UNREACHABLE")
    assert response.headers["x-should-retry"] == "false"
    assert server.runtime.num_instances == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_that_passes_ends_the_request_and_its_work(server, stream):
    asked = body(num_inference_steps=100, stream=stream)
    async with client(server) as http:
        task = asyncio.create_task(http.post(GENERATIONS, json=asked, headers={"grpc-timeout": "2S"}))
        await eventually(lambda: bool(server.inspect().live))
        [generation] = server.generations._live.values()
        generation.expire()
        response = await task
    if stream:
        [(name, event)] = server_sent(response.text)
        assert (name, event["error"]["code"]) == ("error", "DEADLINE_EXCEEDED")
    else:
        assert (response.status_code, error_of(response)["code"]) == (504, "DEADLINE_EXCEEDED")
    await eventually(lambda: not server.inspect().live)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels(server, stream):
    async with raw_connection(server) as (_, writer):
        writer.write(post(server, body(num_inference_steps=1000, stream=stream)))
        await eventually(lambda: bool(server.inspect().live))
        [generation] = server.generations._live.values()
    await eventually(lambda: generation.ended)
    assert generation.error.reason == "GENERATION_CANCELLED"
    await eventually(lambda: len(server.streams) == 0)


@pytest.fixture
def large_previews(monkeypatch):
    """Makes previews larger than the kernel's buffers for a client that does not read."""
    small = ImageAnswer.partial
    monkeypatch.setattr(ImageAnswer, "partial", lambda *given: small(*given) | {"padding": "x" * 200_000})


async def test_one_that_does_not_read_gets_newer_previews_and_no_backlog(server, large_previews):
    """No second preview is made while it has not read the first."""
    asked = body(num_inference_steps=300, stream=True, partial_images=3, seed=1)
    async with raw_connection(server, receive_bytes=8192) as (reader, writer):
        writer.write(post(server, asked))
        await eventually(lambda: bool(server.inspect().live))
        [generation] = server.generations._live.values()
        await eventually(lambda: generation.ended)
        assert generation.log.num_previews == 1
        assert len(server.streams) == 1, "its picture still has to be sent"
        sent = b""
        while not sent.endswith(b"\r\n0\r\n\r\n"):
            sent += await reader.read(8192)
        assert sent.count(b"event: image_generation.partial_image") == 1
        assert sent.count(b"event: image_generation.completed") == 1


async def test_one_that_never_reads_is_closed_and_cancels(large_previews):
    stall = http_server(watcher_stall_s=0.3)
    async with stall as running, raw_connection(running, receive_bytes=8192) as (reader, writer):
        writer.write(post(running, body(num_inference_steps=1000, stream=True, partial_images=3)))
        await eventually(lambda: bool(running.inspect().live))
        [generation] = running.generations._live.values()
        await eventually(lambda: generation.ended)
        assert generation.error.reason == "GENERATION_CANCELLED"
        await eventually(lambda: len(running.streams) == 0)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            async with asyncio.timeout(15):
                await reader.readexactly(10_000_000)  # more than is sent


# --- connections ---


async def test_headers_that_do_not_come_close_the_connection(monkeypatch):
    monkeypatch.setattr(http_listener, "HEAD_S", 0.2)
    async with http_server() as running, raw_connection(running) as (silent, _):
        async with raw_connection(running) as (reader, writer):

            async def drip() -> None:
                for byte in post(running, body()) * 100:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.01)

            dripping = asyncio.create_task(drip())
            for one in (silent, reader):
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    async with asyncio.timeout(15):
                        await one.readexactly(1)
            dripping.cancel()
        monkeypatch.setattr(http_listener, "HEAD_S", 30.0)
        async with client(running) as http:
            assert (await http.post(GENERATIONS, json=body())).status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(http_calls, "BODY_S", 0.1)
    async with http_server() as running, raw_connection(running) as (reader, writer):
        writer.write(post(running, body())[:-1])
        async with asyncio.timeout(15):
            assert b" 408 " in await reader.readline()
            await reader.read()  # until it is closed
        assert len(running.streams) == 0


async def test_connections_are_bounded():
    async with http_server(http_max_connections=2) as running:
        async with raw_connection(running), raw_connection(running), raw_connection(running) as (reader, writer):
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        async with asyncio.timeout(20), client(running) as http:
            while True:  # until the server has seen that they are closed
                with contextlib.suppress(httpx2.TransportError):
                    assert (await http.get("/healthz")).status_code == 200
                    return


async def test_what_is_no_http_is_refused(server):
    async with raw_connection(server) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nno colon\r\n\r\n")
        assert b" 400 " in await reader.readline()
    async with raw_connection(server) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 100_000)
        assert b" 400 " in await reader.readline()


@pytest.mark.parametrize("beyond", [0, 1, 40_000])
@pytest.mark.parametrize("pieces", [1, 2])
async def test_heads_are_bounded_to_the_byte_whatever_pieces_they_come_in(server, beyond, pieces):
    begin, end = b"GET /healthz?x HTTP/1.1\r\nhost: localhost\r\nx: ", b"\r\n\r\n"
    head = begin + b"x" * (16_384 + beyond - len(begin) - len(end)) + end
    cut = len(head) - 1 if pieces == 2 else len(head)
    async with raw_connection(server) as (reader, writer):
        writer.write(head[:cut])
        if head[cut:]:
            await writer.drain()  # another piece to the server, or the same one: the answer is the same
            writer.write(head[cut:])
        async with asyncio.timeout(15):
            assert (b" 400 " if beyond else b" 200 ") in await reader.readline()


async def test_a_drain_delivers_what_runs_and_refuses_what_comes(server):
    async with client(server) as http, client(server) as other:
        await other.get("/healthz")  # its connection is there before
        with steps_paused(server):
            asked = [
                asyncio.create_task(http.post(GENERATIONS, json=body(stream=s, seed=int(s)))) for s in (False, True)
            ]
            await eventually(lambda: server.inspect().live == 2)
            drained = server.drain(40.0)
            assert (await other.get("/healthz")).status_code == 503
            response = await other.post(GENERATIONS, json=body())
            assert (response.status_code, error_of(response)["code"]) == (503, "DRAINING")
            assert response.headers["x-should-retry"] == "true"
        plain, streamed = await asyncio.gather(*asked)
        assert plain.json()["data"]
        assert server_sent(streamed.text)[-1][0] == "image_generation.completed"
        await drained
    with pytest.raises(OSError):
        async with raw_connection(server):
            pass


async def test_a_drain_without_time_ends_what_runs(server):
    async with client(server) as http:
        task = asyncio.create_task(http.post(GENERATIONS, json=body(num_inference_steps=1000)))
        await eventually(lambda: bool(server.inspect().live))
        await server.drain(0.0)
        response = await task
    assert (response.status_code, error_of(response)["code"]) == (503, "DRAINING")
    assert error_of(response)["safelight"]["metadata"]["seeds"]


# --- what an operator sees ---


async def test_models_are_listed_with_what_they_offer(server):
    async with client(server) as http:
        [model] = (await http.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"], model["owned_by"]) == ("simulated", "model", "safelight")
        assert model["safelight"]["sizes"] == [{"width_px": 128, "height_px": 128}]
        assert (await http.get("/v1/models/simulated")).json() == model


async def test_a_trace_of_the_client_is_gone_on_with(server):
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with client(server) as http:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        answer = (await http.post(GENERATIONS, json=body(), headers=headers)).json()
    assert answer["safelight"]["trace_id"] == trace


async def test_requests_are_counted_by_route_and_status():
    metrics_port = free_port()
    async with http_server(metrics_port=metrics_port) as running, client(running) as http:
        await http.post(GENERATIONS, json=body())
        await http.post(GENERATIONS, json={})
        await http.get("/v1/models/none")
        answer = await http.get(f"http://127.0.0.1:{metrics_port}/metrics")
    for route, status in [(GENERATIONS, 200), (GENERATIONS, 400), ("/v1/models/{model}", 404)]:
        assert f'safelight_http_requests_total{{route="{route}",status="{status}"}} 1.0' in answer.text
    assert 'safelight_refused_total{reason="INVALID_REQUEST"} 1.0' in answer.text
    assert 'safelight_generations_total{status="OK"} 1.0' in answer.text


async def test_a_port_that_is_taken_is_said_at_start(server):
    with pytest.raises(StartError, match="http_port"):
        async with http_server(http_port=int(server.http_address.rpartition(":")[2])):
            pass


async def test_without_a_port_there_is_no_http(start):
    async with start(**SIMULATED) as running:
        assert running.http_address == ""


async def test_a_bug_is_told_as_one_and_nothing_more(server, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("safelight_server.http.images.parse", broken)
    async with client(server) as http:
        response = await http.post(GENERATIONS, json=body())
    assert (response.status_code, error_of(response)["code"]) == (500, "INTERNAL")
    assert "secret" not in response.text
    assert json.loads(response.text)
