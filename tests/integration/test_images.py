"""Uploaded pictures: uploads, refused uploads, and development from them with the real model."""

from __future__ import annotations

import asyncio
import hashlib
import io

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from safelight import Client, GenerationError, Preview
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import images_pb2, images_pb2_grpc
from safelight_server.api.identity import new_key
from safelight_server.domain.caller import Caller
from safelight_server.domain.picture import scaled

from tests.conftest import eventually, serving_here
from tests.integration.test_generate import all_at_once, collect, pixels, reason_of, request
from tests.integration.test_requests import details, fields
from tests.support.pause import steps_paused

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIMULATED = {"runtime": "simulated", "simulated_base_ms": 1.0, "simulated_row_ms": 0.0}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


ACROSS, DOWN = np.meshgrid(np.arange(128), np.arange(128))
PHOTO = png(Image.fromarray(np.stack([2 * ACROSS, 2 * DOWN, 255 - ACROSS - DOWN], axis=2).astype(np.uint8)))
MASK = png(Image.fromarray(((ACROSS + DOWN > 120) * 255).astype(np.uint8)))
NONE = "images/" + "ab" * 32


def name_of(data: bytes) -> str:
    return f"images/{hashlib.sha256(data).hexdigest()}"


def pieces(data: bytes, **first: object) -> list[images_pb2.UploadImageRequest]:
    """The messages of an upload; `first` replaces fields of the first one by wrong values."""
    head = {"sha256": hashlib.sha256(data).digest(), "total_bytes": len(data)} | first
    size = 32 << 10
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return [images_pb2.UploadImageRequest(**head), *(images_pb2.UploadImageRequest(data=part) for part in parts)]


async def upload(channel: grpc.aio.Channel, data: bytes, metadata: object = None, **first: object) -> images_pb2.Image:
    stub = images_pb2_grpc.ImageServiceStub(channel)
    return (await stub.UploadImage(iter(pieces(data, **first)), metadata=metadata)).image


def development(seed: int, sampler: str = "ddim", **spec: object) -> pb.GenerateRequest:
    """A request that bypasses the caches."""
    message = request(seed, steps=10)
    message.spec.MergeFrom(pb.GenerationSpec(sampler=pb.SamplerSpec(name=sampler), **spec))
    message.cache.mode = pb.CachePolicy.MODE_BYPASS
    return message


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server():
    async with serving_here() as running, grpc.aio.insecure_channel(running.address) as channel:
        yield running, channel


async def test_an_upload_is_known_by_its_digest_and_can_be_asked_for(server):
    _, channel = server
    sent = await upload(channel, PHOTO)
    assert (sent.name, sent.media_type, sent.total_bytes) == (name_of(PHOTO), "image/png", len(PHOTO))
    assert (sent.width_px, sent.height_px) == (128, 128)
    stub = images_pb2_grpc.ImageServiceStub(channel)
    found = (await stub.GetImage(images_pb2.GetImageRequest(name=sent.name))).image
    assert (found.name, found.width_px, found.total_bytes) == (sent.name, 128, len(PHOTO))
    assert abs(found.expire_time.ToNanoseconds() - sent.expire_time.ToNanoseconds()) < 60e9
    again = await upload(channel, PHOTO)
    assert again.expire_time.ToNanoseconds() >= sent.expire_time.ToNanoseconds()
    for name, reason in ((NONE, "IMAGE_NOT_FOUND"), ("photo.png", "INVALID_REQUEST")):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetImage(images_pb2.GetImageRequest(name=name))
        assert reason_of(refused.value) == reason


@pytest.mark.parametrize(
    ("data", "first", "field", "why"),
    [
        (PHOTO, {"sha256": b"x"}, "sha256", "must be the SHA-256 of the file, 32 bytes"),
        (PHOTO, {"sha256": bytes(32)}, "sha256", "does not match the bytes that came"),
        (PHOTO, {"total_bytes": 0}, "total_bytes", "must be from 1 to 16777216"),
        (PHOTO, {"total_bytes": (16 << 20) + 1}, "total_bytes", "must be from 1 to 16777216"),
        (PHOTO, {"total_bytes": len(PHOTO) + 1}, "data", "bytes where"),
        (PHOTO, {"total_bytes": 10}, "data", "has more bytes where 10 were announced"),
        (PHOTO[:200], {}, "data", "is damaged or cut off"),
        (b"not a picture", {}, "data", "cannot be read as a picture"),
    ],
)
async def test_an_upload_that_cannot_be_used_names_the_field(server, data, first, field, why):
    _, channel = server
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await upload(channel, data, **first)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(details(refused.value)) == [field]
    assert why in refused.value.details()


async def test_an_upload_without_a_piece_is_refused(server):
    _, channel = server
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await images_pb2_grpc.ImageServiceStub(channel).UploadImage(iter(()))
    assert fields(details(refused.value)) == ["data"]


@pytest.mark.parametrize("spec", [{"init_image": NONE}, {"init_image": name_of(PHOTO), "mask": NONE}])
async def test_a_picture_that_is_not_there_is_not_found_under_its_field(server, spec):
    running, channel = server
    await upload(channel, PHOTO)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await collect(stubs.GenerationServiceStub(channel).Generate(development(1, **spec)))
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")
    assert fields(details(refused.value)) == ["spec.mask" if "mask" in spec else "spec.init_image"]
    assert not running.inspect().live


async def test_pictures_are_the_same_alone_and_beside_others(server):
    """Text, img2img and inpainting with several samplers share batches; each is bit-equal to the same request alone."""
    running, channel = server
    stub = stubs.GenerationServiceStub(channel)
    init, mask = (await upload(channel, PHOTO)).name, (await upload(channel, MASK)).name
    kinds = [{}, {"init_image": init, "strength": 0.6}, {"init_image": init, "strength": 0.9, "mask": mask}]
    messages = [
        development(seed, sampler, **spec)
        for seed, sampler in enumerate(("ddim", "euler_ancestral", "dpmpp_2m"))
        for spec in kinds
    ]
    together = await all_at_once(running, stub, messages)
    shared = [max(e.progress.batch_size for e in events if e.HasField("progress")) for events in together]
    assert max(shared) > 1
    for message, events in zip(messages, together, strict=True):
        alone = pixels(await collect(stub.Generate(message)))
        assert np.array_equal(alone, pixels(events))
        steps = [event.progress.step for event in events if event.HasField("progress")]
        strength = message.spec.strength or 1.0
        assert max(steps) == 10 and min(steps) > 10 - round(10 * strength)
        assert events[-1].finished.usage.num_steps == round(10 * strength)
    photo, kept = np.asarray(Image.open(io.BytesIO(PHOTO))), np.asarray(Image.open(io.BytesIO(MASK))) == 0
    for number in range(2, 9, 3):
        painted = pixels(together[number])
        assert np.array_equal(painted[kept], photo[kept])
        assert not np.array_equal(painted[~kept], photo[~kept])


async def test_caches_tell_pictures_apart_and_know_them_again(server):
    running, channel = server
    stub = stubs.GenerationServiceStub(channel)
    init, mask = (await upload(channel, PHOTO)).name, (await upload(channel, MASK)).name
    kinds = [
        {"init_image": init},
        {"init_image": init, "strength": 0.5},
        {"init_image": init, "mask": mask},
        {"init_image": mask},
        {},
    ]
    messages = [development(77, **spec) for spec in kinds]
    for message in messages:
        message.cache.mode = pb.CachePolicy.MODE_DEFAULT
    first = [await collect(stub.Generate(message)) for message in messages]
    assert len({pixels(events).tobytes() for events in first}) == len(kinds)
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    for message, events in zip(messages, first, strict=True):
        again = await collect(stub.Generate(message))
        [result] = again[-1].finished.cache_results
        assert result.disposition == pb.CacheResult.DISPOSITION_EXACT
        assert result.num_steps_skipped == events[-1].finished.usage.num_steps
        assert np.array_equal(pixels(again), pixels(events))


async def test_the_accepted_spec_gives_the_same_picture(server):
    _, channel = server
    stub = stubs.GenerationServiceStub(channel)
    init = (await upload(channel, PHOTO)).name
    events = await collect(stub.Generate(development(5, init_image=init, strength=0.7)))
    effective = events[0].accepted.spec
    assert (effective.init_image, effective.strength) == (init, pytest.approx(0.7))
    message = development(5)
    message.spec.CopyFrom(effective)
    assert np.array_equal(pixels(await collect(stub.Generate(message))), pixels(events))


async def test_a_branch_of_a_picture_starts_from_the_same_picture(server):
    running, channel = server
    stub = stubs.GenerationServiceStub(channel)
    init, mask = (await upload(channel, PHOTO)).name, (await upload(channel, MASK)).name
    spec = {"init_image": init, "strength": 0.9, "mask": mask}
    message = development(9, **spec)
    message.cache.mode = pb.CachePolicy.MODE_DEFAULT
    first = await collect(stub.Generate(message))
    await eventually(lambda: not (running.inspect().live or running.inspect().keeping))
    message.branch.CopyFrom(pb.Branch(generation=first[0].generation, step=4))
    branched = await collect(stub.Generate(message))
    [result] = branched[-1].finished.cache_results
    assert (result.disposition, result.num_steps_skipped) == (pb.CacheResult.DISPOSITION_BRANCHED, 3)
    assert np.array_equal(pixels(branched), pixels(first))
    message.spec.ClearField("mask")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await collect(stub.Generate(message))
    assert "init_image, strength and mask" in refused.value.details()


async def test_pictures_are_their_tenant_s_own(tmp_path):
    (ann, ann_entry), (bob, bob_entry) = new_key("ann", "one"), new_key("bob", "other")
    file = tmp_path / "keys.json"
    file.write_text(f'{{"keys": [{ann_entry}, {bob_entry}]}}')
    pools = {"all": ["one", "other"]}
    async with (
        serving_here(**SIMULATED, api_key_file=file, cache_pools=pools) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        mine, theirs = ((("authorization", f"Bearer {key}"),) for key in (ann, bob))
        images, generations = images_pb2_grpc.ImageServiceStub(channel), stubs.GenerationServiceStub(channel)
        name = (await upload(channel, PHOTO, mine)).name
        message = development(1, init_image=name)
        await collect(generations.Generate(message, metadata=mine))
        for ask in (
            images.GetImage(images_pb2.GetImageRequest(name=name), metadata=theirs),
            collect(generations.Generate(message, metadata=theirs)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask
            assert reason_of(refused.value) == "IMAGE_NOT_FOUND"
        await upload(channel, PHOTO, theirs)
        await collect(generations.Generate(message, metadata=theirs))


async def test_uploads_are_bounded_by_tenant():
    async with (
        serving_here(**SIMULATED, max_image_bytes=len(PHOTO)) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = images_pb2_grpc.ImageServiceStub(channel)
        waits = asyncio.Event()

        async def slow():
            yield pieces(PHOTO)[0]
            await waits.wait()
            for piece in pieces(PHOTO)[1:]:
                yield piece

        under_way = [stub.UploadImage(slow()) for _ in range(4)]
        await eventually(lambda: running.uploads.num_bytes == 4 * len(PHOTO))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await upload(channel, PHOTO)
        assert reason_of(refused.value) == "TOO_MANY_UPLOADS"
        async with Client(running.address, retries=1) as client:
            sent = asyncio.create_task(client.generate("x", init_image=PHOTO, steps=1, strength=1.0).picture())
            under_way.pop().cancel()
            await eventually(lambda: running.uploads.num_bytes == 3 * len(PHOTO))
            assert (await sent).data, "the client asks again"
        waits.set()
        for call in under_way:
            assert (await call).image.name == name_of(PHOTO)
        assert running.uploads.num_bytes == 0


async def test_the_client_uploads_what_the_server_lacks(server, tmp_path):
    running, _ = server
    path = tmp_path / "photo.png"
    other = png(Image.new("RGB", (40, 30), "teal"))
    path.write_bytes(other)
    options = {"seed": 3, "steps": 6, "strength": 0.5, "cache": "bypass"}
    async with Client(running.address) as client:
        first = await client.generate("a red potion", init_image=path, mask=MASK, **options).picture()
        named = await client.generate(
            "a red potion", init_image=name_of(other), mask=name_of(MASK), **options
        ).picture()
        assert first.data == named.data
        assert (await client.upload_image(path)).name == name_of(other)
        path.write_bytes(b"no picture")
        with pytest.raises(GenerationError) as refused:
            await client.generate("a red potion", init_image=path).picture()
        assert refused.value.violations == {"init_image": "cannot be read as a picture; send PNG, JPEG or WebP"}
        for wrong in ("photo.png", tmp_path / "absent.png"):
            with pytest.raises(ValueError, match="init_image: "):
                client.generate("a red potion", init_image=wrong)


async def test_previews_keep_what_the_picture_keeps(server):
    running, _ = server
    photo, mask = (np.asarray(Image.open(io.BytesIO(data))) for data in (PHOTO, MASK))
    options = {"seed": 3, "steps": 20, "strength": 1.0, "cache": "bypass", "preview_media_type": "image/png"}
    async with Client(running.address) as client:
        events = [event async for event in client.generate("a red potion", init_image=PHOTO, mask=MASK, **options)]
    previews = [np.asarray(event.image()) for event in events if isinstance(event, Preview)]
    assert previews
    for preview in previews:
        height, width, _ = preview.shape
        kept = scaled(mask, width, height) == 0
        assert np.array_equal(preview[kept], scaled(photo, width, height)[kept])
        assert not np.array_equal(preview[~kept], scaled(photo, width, height)[~kept])


async def test_pictures_of_generations_under_way_count_in_their_bytes(server):
    """A thousand that wait with large pictures would fill the memory."""
    running, channel = server
    init, mask = (await upload(channel, PHOTO)).name, (await upload(channel, MASK)).name
    spec = running.catalog.get("").manifest.sizes[0]
    with steps_paused(running):
        message = development(31, init_image=init, mask=mask)
        call = stubs.GenerationServiceStub(channel).Generate(message)
        accepted = (await call.read()).event
        caller = Caller("anyone", "default")
        generation = await running.generations.find(caller, accepted.generation.partition("/")[2])
        assert generation.picture_bytes == spec.width_px * spec.height_px * (3 + 1)
        held = generation.held_bytes
    while await call.read() is not grpc.aio.EOF:
        pass
    assert generation.ended
    assert generation.held_bytes < held + 20_000
