"""Image edits over HTTP against a real server: forms, and forms that are refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import grpc
import pytest
from PIL import Image
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.http import edits
from safelight_server.http.form import read_form
from starlette.datastructures import Headers

from tests.conftest import eventually
from tests.integration.test_images import MASK, PHOTO, name_of, png
from tests.support.http import client, http_server, raw_connection, server_sent

EDITS = "/v1/images/edits"
TEXTS = {"prompt": "a red potion", "num_inference_steps": "10", "seed": "7", "strength": "0.6"}


def clear(*, size: tuple[int, int] = (128, 128)) -> bytes:
    """A mask as in OpenAI's API, whose left half is transparent."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return png(mask)


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


CLEAR = clear()
GREY = png(Image.new("L", (128, 128), 200))


@pytest.fixture
async def server():
    async with http_server() as running:
        yield running


def files(image: bytes = PHOTO, **more: bytes) -> dict[str, tuple[str, bytes]]:
    return {name: (f"{name}.png", data) for name, data in ({"image": image} | more).items()}


async def over_grpc(running, seed: int, **spec: object) -> bytes:
    """The picture of the same request over gRPC, with the pictures that were uploaded by HTTP."""
    given = pb.GenerationSpec(prompt="a red potion", num_inference_steps=10, outputs=[pb.OutputSpec(seed=seed)], **spec)
    async with grpc.aio.insecure_channel(running.address) as channel:
        call = stubs.GenerationServiceStub(channel).Generate(pb.GenerateRequest(spec=given))
        return b"".join([answer.event.artifact_chunk.data async for answer in call])


async def test_an_edit_is_the_picture_that_grpc_gives(server):
    async with client(server) as http:
        response = await http.post(EDITS, data=TEXTS | {"n": "2"}, files=files())
        assert response.status_code == 200, response.text
        answer = response.json()
        found = [base64.b64decode(one["b64_json"]) for one in answer["data"]]
        wanted = [await over_grpc(server, seed, init_image=name_of(PHOTO), strength=0.6) for seed in (7, 8)]
        assert found == wanted
        assert answer["usage"]["input_tokens_details"]["image_tokens"] == 16 * 16
        assert answer["safelight"]["strength"] == 0.6
        masked = (await http.post(EDITS, data=TEXTS, files=files(mask=CLEAR))).json()
    [picture] = [base64.b64decode(one["b64_json"]) for one in masked["data"]]
    assert picture == await over_grpc(server, 7, init_image=name_of(PHOTO), strength=0.6, mask=name_of(CLEAR))
    with Image.open(io.BytesIO(picture)) as image, Image.open(io.BytesIO(PHOTO)) as photo:
        right, left = (64, 0, 128, 128), (0, 0, 64, 128)
        assert image.crop(right).tobytes() == photo.crop(right).tobytes(), "what is opaque is kept"
        assert image.crop(left).tobytes() != photo.crop(left).tobytes()
    await eventually(lambda: not server.inspect().live)
    assert server.uploads.num_bytes == 0


async def test_a_stream_has_previews_and_each_picture(server):
    asked = TEXTS | {"stream": "true", "partial_images": "2", "n": "2", "num_inference_steps": "200"}
    async with client(server) as http:
        response = await http.post(EDITS, data=asked, files=files())
    events = server_sent(response.text)
    partial = [event for name, event in events if name == "image_edit.partial_image"]
    completed = [event for name, event in events if name == "image_edit.completed"]
    assert len(partial) + len(completed) == len(events)
    assert partial
    assert sorted(event["image_index"] for event in completed) == [0, 1]
    assert "safelight" in completed[-1]


REFUSED = [
    ({}, {}, "image", "is missing"),
    ({"image": "x"}, {}, "image", "must be a file"),
    ({}, {"image": b"no picture"}, "image", "cannot be read as a picture"),
    ({}, {"image": PHOTO[:200]}, "image", "is damaged or cut off"),
    ({}, {"image": b""}, "image", "cannot be read as a picture"),
    ({}, {"image": PHOTO, "image[]": GREY}, "image", "occurs 2 times"),
    ({}, {"image": PHOTO, "mask": GREY}, "mask", "alpha channel"),
    ({}, {"image": PHOTO, "mask": jpeg(Image.new("RGB", (128, 128)))}, "mask", "must be a PNG"),
    ({}, {"image": PHOTO, "mask": clear(size=(64, 64))}, "mask", "64x64 pixels where the picture has 128x128"),
    ({"mask": "x"}, {"image": PHOTO}, "mask", "must be a file"),
    ({}, {"image": PHOTO, "prompt": b"x"}, "prompt", "must be a text"),
    ({}, {"image": PHOTO, "markup": b"x"}, "markup", "is no parameter"),
    ({"style": "vivid"}, {"image": PHOTO}, "style", "no styles"),
    ({"input_fidelity": "high"}, {"image": PHOTO}, "input_fidelity", "strength"),
    ({"response_format": "url"}, {"image": PHOTO}, "response_format", "b64_json"),
    ({"n": "0"}, {"image": PHOTO}, "n", "greater than or equal to 1"),
    ({"n": "two"}, {"image": PHOTO}, "n", "integer"),
    ({"stream": "perhaps"}, {"image": PHOTO}, "stream", "boolean"),
    ({"partial_images": "1"}, {"image": PHOTO}, "partial_images", "only with stream"),
    ({"strength": "0"}, {"image": PHOTO}, "strength", "must be above 0"),
    ({"strength": "nan"}, {"image": PHOTO}, "strength", "finite number"),
    ({"size": "1024x1024"}, {"image": PHOTO}, "size", "128x128"),
]


@pytest.mark.parametrize(("texts", "sent", "param", "why"), REFUSED)
async def test_what_cannot_be_used_is_refused_by_its_name(server, texts, sent, param, why):
    form = {name: (None, text.encode()) for name, text in ({"prompt": "x"} | texts).items() if name not in sent}
    async with client(server) as http:
        response = await http.post(EDITS, files=form | files_of(sent))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "INVALID_REQUEST"), response.text
    assert why in error["message"]
    assert server.uploads.num_bytes == 0
    assert not server.inspect().live


def files_of(sent: dict[str, bytes]) -> dict[str, tuple[str, bytes]]:
    return {name: ("file", data) for name, data in sent.items()}


async def test_a_text_that_comes_twice_is_refused(server):
    parts = [("prompt", (None, b"x")), ("prompt", (None, b"y")), ("image", ("a.png", PHOTO))]
    async with client(server) as http:
        response = await http.post(EDITS, files=parts)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("headers", "data", "status"),
    [
        ({"content-type": "application/json"}, json.dumps(TEXTS).encode(), 415),
        ({"content-type": "multipart/form-data"}, b"", 415),
        ({"content-type": "multipart/form-data; boundary=x"}, b"no form", 400),
    ],
)
async def test_what_is_no_form_is_refused(server, headers, data, status):
    async with client(server) as http:
        response = await http.post(EDITS, content=data, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


async def test_pages_of_other_origins_send_no_forms():
    """Browsers send forms to other origins without a preflight request, so the server must check the origin."""
    async with http_server(http_cors_origins="https://app.example") as running, client(running) as http:
        own = f"http://{running.http_address}"
        refused = [("https://evil.example", 403), ("null", 403), ("http://[", 403)]
        for origin, status in [*refused, ("https://app.example", 200), (own, 200)]:
            response = await http.post(EDITS, data=TEXTS, files=files(), headers={"origin": origin})
            assert response.status_code == status, response.text


async def test_files_and_the_body_are_bounded():
    async with http_server(max_image_bytes=len(PHOTO) - 1) as running, client(running) as http:
        response = await http.post(EDITS, data=TEXTS, files=files())
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "image")
        assert f"at most {len(PHOTO) - 1}" in error["message"]
        assert running.uploads.num_bytes == 0


@pytest.mark.parametrize("announced", [40 << 20, None])
async def test_a_form_that_is_too_large_is_not_kept(server, announced, monkeypatch):
    monkeypatch.setattr(edits, "NUM_FILES", 0)  # else the test that announces nothing would send much
    length = "transfer-encoding: chunked" if announced is None else f"content-length: {announced}"
    async with raw_connection(server) as (reader, writer):
        head = f"POST {EDITS} HTTP/1.1\r\nhost: {server.http_address}\r\n{length}\r\n"
        writer.write(f"{head}content-type: multipart/form-data; boundary=x\r\n\r\n".encode())
        if announced is None:
            part = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + bytes(200_000)
            writer.write(b"%x\r\n%b" % (len(part), part))
        async with asyncio.timeout(15):
            assert b" 413 " in await reader.readline()
    await eventually(lambda: server.uploads.num_bytes == 0)


async def test_forms_under_way_count_among_the_uploads():
    """A form reserves space before it is read, until its pictures are stored."""
    async with http_server(simulated_base_ms=50.0) as running, client(running) as http:
        announced = 2 * (16 << 20)
        head = f"POST {EDITS} HTTP/1.1\r\nhost: {running.http_address}\r\ncontent-length: {announced}\r\n"
        head += "content-type: multipart/form-data; boundary=x\r\n\r\n"
        async with raw_connection(running) as (_, one), raw_connection(running) as (_, other):
            for writer in (one, other):
                writer.write(head.encode())
            await eventually(lambda: running.uploads.num_bytes == 2 * announced)
            response = await http.post(EDITS, data=TEXTS, files=files())
            assert (response.status_code, response.json()["error"]["code"]) == (429, "TOO_MANY_UPLOADS")
            assert response.headers["retry-after"] == "1"
        await eventually(lambda: running.uploads.num_bytes == 0)
        task = asyncio.create_task(http.post(EDITS, data=TEXTS | {"num_inference_steps": "1000"}, files=files()))
        await eventually(lambda: bool(running.inspect().live))
        assert running.uploads.num_bytes == 0, "the generation needs the form no more"
        task.cancel()
        await eventually(lambda: not running.inspect().live)


async def test_a_form_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(edits, "UPLOAD_S", 0.1)
    async with raw_connection(server) as (reader, writer):
        head = f"POST {EDITS} HTTP/1.1\r\nhost: {server.http_address}\r\ncontent-length: 1000\r\n"
        writer.write(f"{head}content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode())
        async with asyncio.timeout(15):
            assert b" 408 " in await reader.readline()
    await eventually(lambda: server.uploads.num_bytes == 0)


async def test_files_of_a_form_are_not_written_to_disk(monkeypatch):
    """Uploaded files must not be on disk unencrypted."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was made")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    data = bytes(3 << 20)

    async def pieces():
        yield b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for start in range(0, len(data), 1 << 16):
            yield data[start : start + (1 << 16)]
        yield b"\r\n--x--\r\n"

    form = await read_form(Headers({"content-type": "multipart/form-data; boundary=x"}), pieces(), 1000)
    assert form.files == {"image": [data]}


async def test_a_mask_of_grey_goes_over_grpc_alone(server):
    """Over gRPC white is developed; OpenAI's API uses transparency only, where a grey mask would mean the opposite."""
    async with client(server) as http:
        response = await http.post(EDITS, data=TEXTS, files=files(mask=MASK))
    assert response.json()["error"]["param"] == "mask"


async def test_the_same_key_attaches_and_another_picture_is_another_request(server):
    key = {"idempotency-key": "edit 1"}
    texts = {name: text for name, text in TEXTS.items() if name != "seed"}
    async with client(server) as http:
        one, other = [(await http.post(EDITS, data=texts, files=files(), headers=key)).json() for _ in range(2)]
        assert one["data"] == other["data"]
        assert one["safelight"]["generation"] == other["safelight"]["generation"]
        response = await http.post(EDITS, data=texts, files=files(GREY), headers=key)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "REQUEST_ID_REUSED")
