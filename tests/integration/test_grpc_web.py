"""gRPC-Web byte by byte: frames, trailers, the text form, and refused requests."""

from __future__ import annotations

import base64
import struct

import httpx2
import pytest
from google.rpc import error_details_pb2, status_pb2
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import models_pb2
from safelight_server.api.identity import new_key

from tests.conftest import eventually
from tests.support.http import client, http_server, raw_connection

GENERATE = "/safelight.v1.GenerationService/Generate"
GET_MODEL = "/safelight.v1.ModelService/GetModel"
BINARY, TEXT = "application/grpc-web+proto", "application/grpc-web-text"
REQUEST = pb.GenerateRequest(spec=pb.GenerationSpec(prompt="x", num_inference_steps=4, outputs=[pb.OutputSpec(seed=7)]))


@pytest.fixture
async def server():
    async with http_server() as running:
        yield running


def frame(data: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BL", flags, len(data)) + data


def frames(data: bytes) -> tuple[list[bytes], dict[str, str]]:
    """The messages of an answer, and its trailers."""
    messages, trailers = [], None
    while data:
        flags, length = struct.unpack_from(">BL", data)
        payload, data = data[5 : 5 + length], data[5 + length :]
        if flags == 0x80:
            assert not data, "the trailers are the last frame"
            trailers = dict(line.split(": ", 1) for line in payload.decode().splitlines())
        else:
            assert flags == 0
            messages.append(payload)
    assert trailers is not None
    return messages, trailers


async def call(running, path: str, data: bytes, kind: str = BINARY, **headers: str) -> httpx2.Response:
    async with client(running) as http:
        return await http.post(path, content=data, headers={"content-type": kind} | headers)


def events(messages: list[bytes]) -> list[pb.GenerationEvent]:
    return [pb.GenerateResponse.FromString(message).event for message in messages]


async def test_a_stream_in_frames_with_its_status_last(server):
    response = await call(server, GENERATE, frame(REQUEST.SerializeToString()))
    assert (response.status_code, response.headers["content-type"]) == (200, BINARY)
    messages, trailers = frames(response.content)
    got = events(messages)
    assert (got[0].WhichOneof("event"), got[-1].WhichOneof("event")) == ("accepted", "finished")
    assert b"".join(event.artifact_chunk.data for event in got).startswith(b"\x89PNG")
    assert trailers["grpc-status"] == "0"


async def test_the_text_form_is_the_same_in_base64(server):
    data = base64.b64encode(frame(REQUEST.SerializeToString()))
    response = await call(server, GENERATE, data, TEXT)
    assert response.headers["content-type"] == "application/grpc-web-text+proto"
    whole, rest = b"", response.content
    while rest:  # each frame is padded by itself
        end = next((at + 4 for at in range(0, len(rest), 4) if rest[at : at + 4].endswith(b"=")), len(rest))
        whole, rest = whole + base64.b64decode(rest[:end]), rest[end:]
    messages, trailers = frames(whole)
    assert events(messages)[-1].WhichOneof("event") == "finished"
    assert trailers["grpc-status"] == "0"


async def test_a_call_with_one_answer(server):
    request = models_pb2.GetModelRequest(name="models/simulated")
    [message], trailers = frames((await call(server, GET_MODEL, frame(request.SerializeToString()))).content)
    assert models_pb2.GetModelResponse.FromString(message).model.name == "models/simulated"
    assert trailers["grpc-status"] == "0"


async def test_a_refusal_has_its_details(server):
    request = models_pb2.GetModelRequest(name="models/né%")
    messages, trailers = frames((await call(server, GET_MODEL, frame(request.SerializeToString()))).content)
    assert messages == []
    assert trailers["grpc-status"] == "5"
    assert "models/n%C3%A9%25" in trailers["grpc-message"]
    status = status_pb2.Status.FromString(base64.b64decode(trailers["grpc-status-details-bin"]))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, info.reason) == (5, "MODEL_NOT_FOUND")
    response = await call(server, GENERATE, frame(b""))
    assert frames(response.content)[1]["grpc-status"] == "3"
    response = await call(server, GENERATE, frame(REQUEST.SerializeToString()), **{"grpc-timeout": "1u"})
    assert frames(response.content)[1]["grpc-status"] == "4"
    response = await call(server, GENERATE, frame(REQUEST.SerializeToString()), **{"grpc-timeout": "soon"})
    assert frames(response.content)[1]["grpc-status"] == "3"


@pytest.mark.parametrize(
    "data", [b"", b"\x00\x00", frame(b"")[:-1], frame(b"x") + b"x", frame(b"", 1), frame(b"", 0x80)]
)
async def test_what_is_no_frame_is_refused(server, data):
    for kind, sent in ((BINARY, data), (TEXT, base64.b64encode(data)), (TEXT, b"*")):
        response = await call(server, GENERATE, sent, kind)
        text = response.content
        if kind == TEXT:
            text = base64.b64decode(text)
        assert frames(text)[1]["grpc-status"] == "3"


async def test_other_content_types_and_services_are_not_there(server):
    for kind in ("application/grpc", "application/json", "text/plain"):
        assert (await call(server, GENERATE, frame(b""), kind)).status_code == 415
    assert (await call(server, "/safelight.v1.CacheService/PurgeCache", frame(b""))).status_code == 404
    assert (await call(server, "/safelight.v1.GenerationService/None", frame(b""))).status_code == 404


async def test_keys_are_asked_for(tmp_path):
    key, entry = new_key("ann", "studio")
    keys = tmp_path / "keys.json"
    keys.write_text(f'{{"keys": [{entry}]}}')
    data = frame(REQUEST.SerializeToString())
    async with http_server(api_key_file=keys) as running:
        assert frames((await call(running, GENERATE, data)).content)[1]["grpc-status"] == "16"
        answered = await call(running, GENERATE, data, authorization=f"Bearer {key}")
        assert frames(answered.content)[1]["grpc-status"] == "0"


async def test_a_page_of_an_allowed_origin_may_call():
    preflight = {"access-control-request-method": "POST", "access-control-request-private-network": "true"}
    preflight["access-control-request-headers"] = "content-type,grpc-timeout,x-grpc-web"
    async with http_server(http_cors_origins="https://app.example") as running, client(running) as http:
        for origin, status in (("https://app.example", 200), ("https://evil.example", 400)):
            response = await http.options(GENERATE, headers=preflight | {"origin": origin})
            assert response.status_code == status


async def test_a_stream_that_is_lost_can_be_resumed(server):
    """As over gRPC and unlike OpenAI's API, since a page knows the name of its generation."""
    request = pb.GenerateRequest(spec=pb.GenerationSpec(prompt="x", num_inference_steps=400))
    data = frame(request.SerializeToString())
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {BINARY}\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    async with raw_connection(server) as (reader, writer):
        writer.write(head.encode() + data)
        await reader.readuntil(b"\r\n\r\n")
        [generation] = server.generations._live.values()
    await eventually(lambda: len(server.streams) == 0)
    assert not generation.ended
    again = pb.WatchGenerationRequest(name=generation.name, preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE))
    watch = "/safelight.v1.GenerationService/WatchGeneration"
    messages, trailers = frames((await call(server, watch, frame(again.SerializeToString()))).content)
    assert events(messages)[-1].WhichOneof("event") == "finished"
    assert trailers["grpc-status"] == "0"
