"""A model that only inpaints, from the client's picture and mask to the denoiser's rows, on ONNX Runtime."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from safelight import Client, GenerationError
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.domain.component import Component
from safelight_server.runtime.onnx import OnnxRuntime

from load_tests.ports import free_port
from tests.conftest import eventually, serving_here
from tests.integration.test_edits import CLEAR, EDITS, TEXTS, files
from tests.integration.test_generate import collect, pixels
from tests.integration.test_images import ACROSS, DOWN, MASK, PHOTO, development, png, upload
from tests.integration.test_requests import details, fields
from tests.support.http import GENERATIONS, body, client
from tests.support.inpainting import models_that_inpaint

pytestmark = pytest.mark.asyncio(loop_scope="module")
OTHER_MASK = png(Image.fromarray(((ACROSS > 40) * (DOWN < 90) * 255).astype(np.uint8)))
PIXELS, KEPT = (np.asarray(Image.open(io.BytesIO(data))) for data in (PHOTO, MASK))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_that_inpaint(tmp_path_factory.mktemp("inpainting"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(models):
    async with (
        serving_here(models_dir=models, num_instances=1, http_port=free_port()) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        names = [(await upload(channel, data)).name for data in (PHOTO, MASK, OTHER_MASK)]
        yield running, stubs.GenerationServiceStub(channel), *names


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the encoder."""
    calls, run = [], OnnxRuntime.run

    async def watched(self, instance, model, component, inputs):
        if component is Component.ENCODER:
            calls.append(len(inputs["image"]))
        return await run(self, instance, model, component, inputs)

    monkeypatch.setattr(OnnxRuntime, "run", watched)
    return calls


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Until it is set, no picture is encoded."""
    opened, run = asyncio.Event(), OnnxRuntime.run

    async def waiting(self, instance, model, component, inputs):
        if component is Component.ENCODER:
            await opened.wait()
        return await run(self, instance, model, component, inputs)

    monkeypatch.setattr(OnnxRuntime, "run", waiting)
    return opened


async def test_rows_with_different_masks_are_in_a_batch_what_they_are_alone(server, gate):
    running, stub, photo, mask, other = server
    kinds = [(mask, 1.0, 3.0), (other, 1.0, 3.0), (mask, 0.6, 3.0), (other, 0.6, 1.0), (mask, None, 1.0)]
    messages = [
        development(seed, init_image=photo, mask=at, strength=strength, guidance_scale=guidance)
        for seed, (at, strength, guidance) in enumerate(kinds)
    ]
    under_way = [asyncio.create_task(collect(stub.Generate(message))) for message in messages]
    await eventually(lambda: running.inspect().live == len(messages))
    gate.set()
    together = await asyncio.gather(*under_way)
    assert max(e.progress.batch_size for events in together for e in events if e.HasField("progress")) > 1
    for message, events in zip(messages, together, strict=True):
        assert np.array_equal(pixels(await collect(stub.Generate(message))), pixels(events))
    for events in (together[0], together[2], together[4]):
        assert np.array_equal(pixels(events)[KEPT == 0], PIXELS[KEPT == 0])
        assert not np.array_equal(pixels(events)[KEPT > 0], PIXELS[KEPT > 0])
    assert [events[-1].finished.usage.num_steps for events in together] == [10, 10, 6, 6, 10]


async def test_the_mask_decides_what_is_drawn(server):
    """In a part that both masks develop anew the pixels differ: the denoiser sees the mask."""
    _, stub, photo, mask, other = server
    one, two = [pixels(await collect(stub.Generate(development(5, init_image=photo, mask=at)))) for at in (mask, other)]
    both = (KEPT > 0) & (np.asarray(Image.open(io.BytesIO(OTHER_MASK))) > 0)
    assert not np.array_equal(one[both], two[both])


@pytest.mark.parametrize(("given", "field"), [((), "spec.init_image"), (("init_image",), "spec.mask")])
async def test_what_lacks_a_picture_or_a_mask_is_refused_under_its_field(server, given, field):
    _, stub, photo, *_ = server
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await collect(stub.Generate(development(1, **dict.fromkeys(given, photo))))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(details(refused.value))[0] == field
    assert "only develops a part of a picture anew" in refused.value.details()


async def test_outputs_with_the_same_picture_and_mask_share_its_encodings(server, encoded):
    _, stub, photo, mask, _ = server
    message = development(8, init_image=photo, mask=mask, strength=0.5)
    message.spec.outputs.add(seed=9)
    await collect(stub.Generate(message))
    assert sum(encoded) == 2, "the whole picture, and what its mask keeps of it"
    encoded.clear()
    message.spec.strength = 1.0
    await collect(stub.Generate(message))
    assert sum(encoded) == 1, "an output that begins from noise needs no latent of the whole picture"


async def test_caches_tell_masks_apart_and_a_branch_goes_on_with_its_mask(server):
    running, stub, photo, mask, other = server
    messages = [development(11, init_image=photo, mask=at) for at in (mask, other)]
    for message in messages:
        message.cache.mode = pb.CachePolicy.MODE_DEFAULT
    first = [await collect(stub.Generate(message)) for message in messages]
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    for message, events in zip(messages, first, strict=True):
        again = await collect(stub.Generate(message))
        assert again[-1].finished.cache_results[0].disposition == pb.CacheResult.DISPOSITION_EXACT
        assert np.array_equal(pixels(again), pixels(events))
    messages[0].branch.CopyFrom(pb.Branch(generation=first[0][0].generation, step=4))
    branched = await collect(stub.Generate(messages[0]))
    [result] = branched[-1].finished.cache_results
    assert (result.disposition, result.num_steps_skipped) == (pb.CacheResult.DISPOSITION_BRANCHED, 4)
    assert np.array_equal(pixels(branched), pixels(first[0]))


async def test_a_client_inpaints_and_is_told_what_lacks(server):
    running, *_ = server
    options = {"seed": 3, "cache": "bypass"}
    async with Client(running.address) as client:
        picture = await client.generate("a red potion", init_image=PHOTO, mask=MASK, **options).picture()
        assert np.array_equal(np.asarray(picture.image())[KEPT == 0], PIXELS[KEPT == 0])
        with pytest.raises(GenerationError) as refused:
            await client.generate("a red potion", init_image=PHOTO).picture()
        assert "say which; a fully transparent PNG stands for all of it" in refused.value.violations["spec.mask"]


async def test_a_model_that_inpaints_makes_edits_alone_over_http(server):
    running, *_ = server
    async with client(running) as http:
        refused = await http.post(GENERATIONS, json=body())
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
        assert "only inpaints: send a picture and a mask to POST /v1/images/edits" in refused.text
        unmasked = await http.post(EDITS, data=TEXTS, files=files())
        assert (unmasked.status_code, unmasked.json()["error"]["param"]) == (400, "mask")
        assert (await http.post(EDITS, data=TEXTS, files=files(mask=CLEAR))).status_code == 200
