"""Pictures to follow, from the client's file to the denoiser's rows, with small networks on ONNX Runtime."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from safelight import Client, Control, GenerationError
from safelight.v1 import generation_pb2 as pb
from safelight_server.api.identity import new_key
from safelight_server.cli.main import main

from tests.conftest import eventually, serving_here
from tests.integration.test_generate import assert_batched_as_alone, collect, pixels, reason_of
from tests.integration.test_images import NONE, development, name_of, png, upload
from tests.integration.test_requests import details, fields
from tests.support.conditions import CONTROLS, NAME, models_with_conditions, serving_conditions

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIGHT, DARK = (png(Image.new("RGB", (30, 20), colour)) for colour in ("white", (60, 50, 40)))
DISPOSITIONS = pb.CacheResult


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_with_conditions(tmp_path_factory.mktemp("controls"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(models):
    async with serving_conditions(models) as served:
        yield served


def controlled(seed: int, *controls: pb.Control, cached: bool = False) -> pb.GenerateRequest:
    message = development(seed)
    message.spec.controls.extend(controls)
    if cached:
        message.cache.mode = pb.CachePolicy.MODE_DEFAULT
    return message


async def test_rows_with_and_without_controls_are_in_a_batch_what_they_are_alone(server):
    running, channel, stub = server
    light, dark = [(await upload(channel, data)).name for data in (LIGHT, DARK)]
    kinds = [
        (),
        (pb.Control(name="edges", image=light),),
        (pb.Control(name="edges", image=light, scale=0.5),),
        (pb.Control(name="edges", image=dark),),
        (pb.Control(name="depth", image=light),),
        (pb.Control(name="edges", image=light, start=0.3, end=0.7),),
        (pb.Control(name="edges", image=light), pb.Control(name="depth", image=dark, end=0.5)),
    ]
    messages = [controlled(1, *kind) for kind in kinds]
    messages[3].spec.guidance_scale = 1.0
    await assert_batched_as_alone(running, stub, messages)


async def test_a_scale_of_0_is_no_control_and_the_order_makes_no_difference(server):
    running, channel, stub = server
    light, dark = [(await upload(channel, data)).name for data in (LIGHT, DARK)]
    edges, depth = pb.Control(name="edges", image=light, scale=0.5), pb.Control(name="depth", image=dark)
    one = await collect(stub.Generate(controlled(3, edges, depth, cached=True)))
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    other = await collect(stub.Generate(controlled(3, depth, edges, cached=True)))
    assert list(one[0].accepted.spec.controls) == [pb.Control(name="depth", image=dark, scale=1.0), edges]
    assert other[0].accepted.spec == one[0].accepted.spec
    assert other[-1].finished.cache_results[0].disposition == DISPOSITIONS.DISPOSITION_EXACT
    edges.scale = 0
    resting = await collect(stub.Generate(controlled(3, edges)))
    assert not resting[0].accepted.spec.controls
    assert np.array_equal(pixels(resting), pixels(await collect(stub.Generate(controlled(3)))))


async def test_the_accepted_spec_gives_the_same_picture(server):
    _, channel, stub = server
    light = (await upload(channel, LIGHT)).name
    events = await collect(stub.Generate(controlled(4, pb.Control(name="depth", image=light, start=0.2, end=0.9))))
    message = controlled(4)
    message.spec.CopyFrom(events[0].accepted.spec)
    assert np.array_equal(pixels(await collect(stub.Generate(message))), pixels(events))


async def test_a_similar_picture_has_the_same_controls(server):
    """The prompt is the same, the seed another: only a picture with equal controls is near enough."""
    running, channel, stub = server
    light, dark = [(await upload(channel, data)).name for data in (LIGHT, DARK)]
    given = {"name": "edges", "image": light, "scale": 0.75, "start": 0.25}
    await collect(stub.Generate(controlled(9, pb.Control(**given), cached=True)))
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    found = []
    for change in ({"image": dark}, {"scale": 0.5}, {"start": 0.5}, {"end": 0.5}, {"name": "depth"}, {}):
        message = controlled(10, pb.Control(**(given | change)))
        message.cache.CopyFrom(pb.CachePolicy(mode=pb.CachePolicy.MODE_ALLOW_SIMILAR, min_similarity=0.5))
        events = await collect(stub.Generate(message))
        found.append(events[-1].finished.cache_results[0].disposition)
        await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    assert found == [DISPOSITIONS.DISPOSITION_MISS] * 5 + [DISPOSITIONS.DISPOSITION_SIMILAR]


async def test_an_output_may_be_the_picture_of_a_control(server):
    _, channel, stub = server
    first = await collect(stub.Generate(controlled(11)))
    output = f"{first[0].generation}/outputs/0"
    named = await collect(stub.Generate(controlled(12, pb.Control(name="edges", image=output))))
    sent = b"".join(event.artifact_chunk.data for event in first)
    [control] = named[0].accepted.spec.controls
    assert control.image == name_of(sent), "the content decides, not the name"
    uploaded = pb.Control(name="edges", image=(await upload(channel, sent)).name)
    assert np.array_equal(pixels(await collect(stub.Generate(controlled(12, uploaded)))), pixels(named))


@pytest.mark.parametrize("image", [NONE, f"generations/{'0' * 32}/outputs/0"])
async def test_a_picture_that_is_not_there_is_not_found_under_its_field(server, image):
    running, _, stub = server
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await collect(stub.Generate(controlled(13, pb.Control(name="depth", image=image))))
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")
    assert fields(details(refused.value)) == ["spec.controls[depth].image"]
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
        picture = await mine.generate("a red potion", steps=2, controls=[Control("edges", LIGHT)]).picture()
        for name in (name_of(LIGHT), picture.name):
            with pytest.raises(GenerationError) as refused:
                await theirs.generate("a red potion", steps=2, controls=[Control("edges", name)]).picture()
            assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")


async def test_the_client_and_the_command_line_take_files(server, tmp_path, monkeypatch, capsys):
    running, _, _ = server
    light, dark, out = tmp_path / "light.png", tmp_path / "dark.png", tmp_path / "out.png"
    light.write_bytes(LIGHT)
    dark.write_bytes(DARK)
    async with Client(running.address) as client:
        [model] = await client.models()
        assert [control.name for control in model.controls] == list(CONTROLS)
        given = [Control("edges", light, 0.5), Control("depth", dark, 1.5, 0.25, 0.75)]
        picture = await client.generate("a red potion", seed=14, steps=4, controls=given).picture()
        with pytest.raises(GenerationError) as refused:
            await client.generate("a red potion", controls=[Control("pose", light)]).picture()
        assert refused.value.violations == {
            "spec.controls[0].name": f"models/{NAME} has no control 'pose'; it has edges, depth"
        }

    def command(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["safelight", *arguments, "--target", running.address])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code

    options = ("--control", f"edges={light}:0.5", "--control", f"depth={dark}:1.5:0.25:0.75")
    await asyncio.to_thread(
        command, "generate", "a red potion", *options, "--seed", "14", "--steps", "4", "--out", str(out)
    )
    assert out.read_bytes() == picture.data
    capsys.readouterr()
    await asyncio.to_thread(command, "models")
    assert "    controls edges, depth" in capsys.readouterr().out


async def test_a_model_without_control_networks_names_the_field():
    async with serving_here(runtime="simulated") as running, Client(running.address) as client:
        with pytest.raises(GenerationError) as refused:
            await client.generate("a red potion", controls=[Control("edges", LIGHT)]).picture()
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.value.violations) == ["spec.controls"]
