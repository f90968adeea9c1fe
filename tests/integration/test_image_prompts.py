"""A picture as a prompt, from the client's file to the denoiser's rows, with small networks on ONNX Runtime."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from safelight import Client, GenerationError
from safelight.v1 import generation_pb2 as pb
from safelight_server.api.identity import new_key
from safelight_server.cli.main import main
from safelight_server.domain.component import Component
from safelight_server.runtime.onnx import OnnxRuntime

from tests.conftest import eventually, serving_here
from tests.integration.test_generate import assert_batched_as_alone, collect, pixels, reason_of
from tests.integration.test_images import NONE, PHOTO, development, name_of, png, upload
from tests.integration.test_requests import details, fields
from tests.support.conditions import NAME, models_with_conditions, serving_conditions

pytestmark = pytest.mark.asyncio(loop_scope="module")
RED, DARK = (png(Image.new("RGB", (30, 20), colour)) for colour in ("red", (20, 10, 0)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_with_conditions(tmp_path_factory.mktemp("image_prompts"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(models):
    async with serving_conditions(models) as served:
        yield served


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the image encoder."""
    calls, run = [], OnnxRuntime.run

    async def watched(self, instance, model, component, inputs):
        if component is Component.IMAGE_ENCODER:
            calls.append(len(inputs["image"]))
        return await run(self, instance, model, component, inputs)

    monkeypatch.setattr(OnnxRuntime, "run", watched)
    return calls


def prompted(seed: int, image: str = "", scale: float | None = None, *, cached: bool = False) -> pb.GenerateRequest:
    message = development(seed)
    if image:
        message.spec.image_prompt.CopyFrom(pb.ImagePrompt(image=image, scale=scale))
    if cached:
        message.cache.mode = pb.CachePolicy.MODE_DEFAULT
    return message


async def test_rows_with_and_without_an_image_prompt_are_in_a_batch_what_they_are_alone(server):
    running, channel, stub = server
    red, dark = [(await upload(channel, data)).name for data in (RED, DARK)]
    messages = [prompted(1), prompted(1, red), prompted(1, red, 0.5), prompted(1, dark), prompted(2), prompted(2, red)]
    messages[5].spec.guidance_scale = 1.0
    await assert_batched_as_alone(running, stub, messages)


async def test_a_scale_of_0_is_no_image_prompt(server):
    _, channel, stub = server
    red = (await upload(channel, RED)).name
    events = await collect(stub.Generate(prompted(3, red, 0.0)))
    assert not events[0].accepted.spec.HasField("image_prompt")
    assert np.array_equal(pixels(events), pixels(await collect(stub.Generate(prompted(3)))))


async def test_the_accepted_spec_says_the_image_prompt_with_its_scale(server):
    _, channel, stub = server
    red = (await upload(channel, RED)).name
    events = await collect(stub.Generate(prompted(4, red)))
    effective = events[0].accepted.spec
    assert (effective.image_prompt.image, effective.image_prompt.scale) == (red, 1.0)
    message = prompted(4)
    message.spec.CopyFrom(effective)
    assert np.array_equal(pixels(await collect(stub.Generate(message))), pixels(events))


async def test_a_picture_is_encoded_once(server, encoded):
    """Requests that wait for it share its encoding; those that come later find it in the cache."""
    running, channel, stub = server
    image = (await upload(channel, png(Image.new("RGB", (9, 9), "teal")))).name
    await asyncio.gather(*(collect(stub.Generate(prompted(seed, image, cached=True))) for seed in (5, 6)))
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    assert encoded == [1]
    events = await collect(stub.Generate(prompted(7, image, 0.5, cached=True)))
    assert encoded == [1]
    assert np.array_equal(pixels(events), pixels(await collect(stub.Generate(prompted(7, image, 0.5)))))
    assert encoded == [1, 1], "a request that bypasses the caches finds nothing there"


async def test_caches_know_a_picture_by_its_content_and_its_scale(server):
    running, channel, stub = server
    red, dark = [(await upload(channel, data)).name for data in (RED, DARK)]
    messages = [prompted(8, *given, cached=True) for given in ((), (red,), (red, 0.5), (dark,))]
    first = [await collect(stub.Generate(message)) for message in messages]
    assert [events[-1].finished.cache_results[0].disposition for events in first] == [
        pb.CacheResult.DISPOSITION_MISS
    ] * 4
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    for message, events in zip(messages, first, strict=True):
        message.cache.mode = pb.CachePolicy.MODE_ALLOW_SIMILAR
        again = await collect(stub.Generate(message))
        [result] = again[-1].finished.cache_results
        assert result.disposition == pb.CacheResult.DISPOSITION_EXACT
        assert np.array_equal(pixels(again), pixels(events))


async def test_a_similar_picture_has_the_same_image_prompt(server):
    """The prompt is the same, the seed another: only a picture with the same image prompt is near enough."""
    running, channel, stub = server
    red, dark = [(await upload(channel, data)).name for data in (RED, DARK)]
    await collect(stub.Generate(prompted(9, red, 0.7, cached=True)))
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    found = []
    for image, scale in ((dark, 0.7), (red, 0.6), (red, 0.7)):
        message = prompted(10, image, scale)
        message.cache.CopyFrom(pb.CachePolicy(mode=pb.CachePolicy.MODE_ALLOW_SIMILAR, min_similarity=0.5))
        events = await collect(stub.Generate(message))
        found.append(events[-1].finished.cache_results[0].disposition)
        await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    miss, similar = pb.CacheResult.DISPOSITION_MISS, pb.CacheResult.DISPOSITION_SIMILAR
    assert found == [miss, miss, similar]


async def test_an_output_may_be_the_image_prompt(server):
    _, channel, stub = server
    first = await collect(stub.Generate(prompted(11)))
    named = await collect(stub.Generate(prompted(12, f"{first[0].generation}/outputs/0")))
    sent = b"".join(event.artifact_chunk.data for event in first)
    assert named[0].accepted.spec.image_prompt.image == name_of(sent), "the content decides, not the name"
    uploaded = (await upload(channel, sent)).name
    assert np.array_equal(pixels(await collect(stub.Generate(prompted(12, uploaded)))), pixels(named))


@pytest.mark.parametrize("image", [NONE, f"generations/{'0' * 32}/outputs/0"])
async def test_a_picture_that_is_not_there_is_not_found_under_its_field(server, image):
    running, _, stub = server
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await collect(stub.Generate(prompted(13, image)))
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")
    assert fields(details(refused.value)) == ["spec.image_prompt.image"]
    assert not running.inspect().live


async def test_pictures_of_other_tenants_are_not_there(models, tmp_path):
    (ann, ann_entry), (bob, bob_entry) = new_key("ann", "one"), new_key("bob", "other")
    file = tmp_path / "keys.json"
    file.write_text(f'{{"keys": [{ann_entry}, {bob_entry}]}}')
    pools = {"all": ["one", "other"]}
    async with (
        serving_here(models_dir=models, num_instances=1, api_key_file=file, cache_pools=pools) as running,
        Client(running.address, api_key=ann) as mine,
        Client(running.address, api_key=bob) as theirs,
    ):
        picture = await mine.generate("a red potion", steps=2, image_prompt=PHOTO).picture()
        for name in (name_of(PHOTO), picture.name):
            with pytest.raises(GenerationError) as refused:
                await theirs.generate("a red potion", steps=2, image_prompt=name).picture()
            assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")


async def test_the_client_and_the_command_line_take_a_file(server, tmp_path, monkeypatch, capsys):
    running, _, _ = server
    path, out = tmp_path / "photo.png", tmp_path / "out.png"
    path.write_bytes(PHOTO)
    async with Client(running.address) as client:
        [model] = await client.models()
        assert model.image_prompt
        options = {"seed": 14, "steps": 3, "image_prompt_scale": 0.5}
        picture = await client.generate("a red potion", image_prompt=path, **options).picture()
        with pytest.raises(ValueError, match="image_prompt_scale: goes with image_prompt"):
            client.generate("a red potion", image_prompt_scale=0.5)

    def command(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["safelight", *arguments, "--target", running.address])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code

    given = ("--image-prompt", str(path), "--image-prompt-scale", "0.5", "--seed", "14", "--steps", "3")
    await asyncio.to_thread(command, "generate", "a red potion", *given, "--out", str(out))
    assert out.read_bytes() == picture.data
    capsys.readouterr()
    await asyncio.to_thread(command, "models")
    said = capsys.readouterr().out
    assert f"models/{NAME}" in said and "takes a picture as a prompt (--image-prompt)" in said
