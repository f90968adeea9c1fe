"""Generations that start from the picture of another generation, by its name."""

from __future__ import annotations

import asyncio
import hashlib

import grpc
import numpy as np
import pytest
import pytest_asyncio
from safelight import Client, GenerationError, SyncClient
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.api.identity import new_key
from safelight_server.cli.main import main

from tests.conftest import eventually, serving_here
from tests.integration.test_generate import collect, pixels, reason_of, request
from tests.integration.test_images import PHOTO, SIMULATED, development, upload
from tests.integration.test_requests import details, fields
from tests.support.pause import steps_paused

pytestmark = pytest.mark.asyncio(loop_scope="module")
RAW, TEXTURE = "application/x-raw-rgba8", "image/ktx2"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server():
    async with serving_here(**SIMULATED) as running, grpc.aio.insecure_channel(running.address) as channel:
        yield running, channel, stubs.GenerationServiceStub(channel)


def bytes_of(events: list[pb.GenerationEvent]) -> bytes:
    return b"".join(event.artifact_chunk.data for event in events)


async def refusal(call: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await collect(call)
    return refused.value


@pytest.mark.parametrize(
    "encoding",
    [
        pb.PixelEncoding(media_type="image/png"),
        pb.PixelEncoding(media_type="image/webp"),
        pb.PixelEncoding(media_type=RAW, row_alignment_bytes=1024),
        pb.PixelEncoding(media_type=RAW, row_order=pb.PixelEncoding.ROW_ORDER_BOTTOM_UP),
    ],
    ids=["png", "webp", "raw", "bottom-up"],
)
async def test_an_output_is_what_its_client_would_have_uploaded(server, encoding):
    _, channel, stub = server
    message = request(1, steps=4)
    message.encoding.CopyFrom(encoding)
    first = await collect(stub.Generate(message))
    plain = await collect(stub.Generate(request(1, steps=4)))
    sent = bytes_of(plain if encoding.media_type == RAW else first)
    by_name = await collect(stub.Generate(development(2, init_image=f"{first[0].generation}/outputs/0")))
    digest = hashlib.sha256(sent).hexdigest()
    assert by_name[0].accepted.spec.init_image == f"images/{digest}", "the content decides, not the name"
    uploaded = await upload(channel, sent)
    assert uploaded.name == f"images/{digest}"
    again = await collect(stub.Generate(development(2, init_image=uploaded.name)))
    assert np.array_equal(pixels(by_name), pixels(again))


async def test_a_mask_may_be_an_output_too(server):
    _, channel, stub = server
    init = (await upload(channel, PHOTO)).name
    first = await collect(stub.Generate(request(3, steps=4)))
    name = f"{first[0].generation}/outputs/0"
    events = await collect(stub.Generate(development(4, init_image=init, mask=name)))
    spec = events[0].accepted.spec
    assert (spec.init_image, spec.mask) == (init, f"images/{hashlib.sha256(bytes_of(first)).hexdigest()}")


async def test_the_caches_know_the_content(server):
    running, channel, stub = server
    first = await collect(stub.Generate(request(5, steps=4)))
    message = development(6, init_image=f"{first[0].generation}/outputs/0")
    message.cache.mode = pb.CachePolicy.MODE_DEFAULT
    named = await collect(stub.Generate(message))
    message.spec.init_image = (await upload(channel, bytes_of(first))).name
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    again = await collect(stub.Generate(message))
    [result] = again[-1].finished.cache_results
    assert result.disposition == pb.CacheResult.DISPOSITION_EXACT
    assert np.array_equal(pixels(again), pixels(named))


async def test_the_same_request_id_attaches_after_the_output_has_gone(server):
    """The request id compares the name as it was sent, so a retry is the same request even if the output is gone."""
    running, _, stub = server
    first = await collect(stub.Generate(request(7, steps=4)))
    message = development(8, init_image=f"{first[0].generation}/outputs/0")
    message.request_id = "6f1c0a52-9b3e-4d0f-8a55-2f0c7d1e9b64"
    one = await collect(stub.Generate(message))
    finished = running.generations._finished
    finished.remove(finished.get(first[0].generation.removeprefix("generations/")))
    other = await collect(stub.Generate(message))
    assert one[0].generation == other[0].generation
    message.request_id = ""
    refused = await refusal(stub.Generate(message))
    assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")
    assert fields(details(refused)) == ["spec.init_image"]
    assert "upload its picture" in refused.details()


async def test_an_output_that_is_not_finished_is_named(server):
    running, _, stub = server
    with steps_paused(running):
        call = stub.Generate(request(9, steps=900))
        name = (await call.read()).event.generation
        refused = await refusal(stub.Generate(development(10, init_image=f"{name}/outputs/0")))
    assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.FAILED_PRECONDITION, "OUTPUT_NOT_FINISHED")
    assert f"{name}/outputs/0 is not finished" in refused.details()
    await stub.CancelGeneration(pb.CancelGenerationRequest(name=name))
    refused = await refusal(stub.Generate(development(10, init_image=f"{name}/outputs/0")))
    assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.FAILED_PRECONDITION, "OUTPUT_HAS_NO_PICTURE")


@pytest.mark.parametrize("form", ["{}", "{}/outputs", "{}/outputs/-1", "{}/outputs/1", "outputs/0", "{}/outputs/0/x"])
async def test_names_of_no_output_are_refused(server, form):
    _, _, stub = server
    first = await collect(stub.Generate(request(11, steps=4)))
    refused = await refusal(stub.Generate(development(12, init_image=form.format(first[0].generation))))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(details(refused)) == ["spec.init_image"]


async def test_a_texture_is_nothing_to_start_from(server):
    _, _, stub = server
    message = request(13, steps=4)
    message.encoding.media_type = TEXTURE
    first = await collect(stub.Generate(message))
    refused = await refusal(stub.Generate(development(14, init_image=f"{first[0].generation}/outputs/0")))
    assert (refused.code(), fields(details(refused))) == (grpc.StatusCode.INVALID_ARGUMENT, ["spec.init_image"])
    assert "image/png" in refused.details()


async def test_outputs_of_other_tenants_are_not_there(tmp_path):
    (ann, ann_entry), (bob, bob_entry) = new_key("ann", "one"), new_key("bob", "other")
    file = tmp_path / "keys.json"
    file.write_text(f'{{"keys": [{ann_entry}, {bob_entry}]}}')
    pools = {"all": ["one", "other"]}
    async with (
        serving_here(**SIMULATED, api_key_file=file, cache_pools=pools) as running,
        Client(running.address, api_key=ann) as mine,
        Client(running.address, api_key=bob) as theirs,
    ):
        picture = await mine.generate("a red potion", steps=4).picture()
        assert (await mine.generate("x", steps=4, init_image=picture).picture()).data
        told = []
        for name in (picture.name, f"generations/{'0' * 32}/outputs/0"):
            with pytest.raises(GenerationError) as refused:
                await theirs.generate("x", steps=4, init_image=name).picture()
            told.append((refused.value.code, refused.value.reason, str(refused.value).replace(name, "")))
        assert told[0] == told[1], "as if it did not exist"
        assert told[0][:2] == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")


async def test_the_client_takes_a_picture_a_generation_and_names(server):
    running, _, _ = server
    options = {"seed": 3, "steps": 6, "strength": 0.5, "cache": "bypass"}
    async with Client(running.address) as client:
        first = await client.generate("a red potion", seed=21, steps=4).picture()
        generation = await client.get(first.generation)
        assert first.name == f"{generation.name}/outputs/0"
        sources = [first, generation, first.name, first.generation, first.data]
        pictures = [await client.generate("a key", init_image=source, **options).picture() for source in sources]
        assert len({picture.data for picture in pictures}) == 1
        other = await client.generate("a key", init_image=first, mask=first, **options).picture()
        assert other.data != pictures[0].data


async def test_the_command_line_takes_a_name(server, tmp_path, monkeypatch):
    running, _, _ = server

    def generate(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["safelight", "generate", "a key", "--target", running.address, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code

    def develop() -> None:
        with SyncClient(running.address) as client:
            first = client.generate("a red potion", seed=22, steps=4).picture()
        path = tmp_path / "first.png"
        path.write_bytes(first.data)
        for number, source in enumerate((str(path), first.name, first.generation)):
            out = tmp_path / f"{number}.png"
            generate("--init", source, "--seed", "1", "--steps", "6", "--out", str(out))

    await asyncio.to_thread(develop)
    assert len({(tmp_path / f"{number}.png").read_bytes() for number in range(3)}) == 1
