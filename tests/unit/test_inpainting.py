"""Models that only inpaint: what their manifests say, what requests need, and what their denoiser is given."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safelight.v1 import models_pb2
from safelight_server.catalog import export
from safelight_server.catalog.catalog import Catalog, ManifestError, load
from safelight_server.catalog.checks import check
from safelight_server.catalog.manifest import Manifest
from safelight_server.catalog.pixels import encoder_image, sampled_mask
from safelight_server.domain.component import Component
from safelight_server.domain.errors import InvalidRequestError
from safelight_server.domain.uploads import PictureFile, decode_mask, has_alpha
from safelight_server.engine.jobs import InitImage, Job
from safelight_server.engine.latents import CleanLatent, Latents, RowMaskedImage, Snapshot
from safelight_server.generations.init_images import InitImages
from safelight_server.runtime.simulated import SimulatedRuntime
from safelight_server.runtime.verification import InputSpec, at_sizes
from safelight_server.sampler import POSTERIOR, SamplerSpec, compile_table, gaussian
from safelight_server.scheduler import Priority
from safelight_server.validation.request import resolve_request
from safelight_server.wire.models import model_message

from tests.support.inpainting import INPUTS, NAME, models_that_inpaint
from tests.support.pipelines import MANIFEST, small_catalog, small_pipeline
from tests.support.streams import SPEC
from tests.unit.test_controls import uploads
from tests.unit.test_validation import IMAGE, LIMITS, request

OTHER_IMAGE = "images/" + "cd" * 32


@pytest.mark.parametrize("lacking", ["mask", "masked_image", "encoder"])
def test_a_mask_goes_with_the_masked_picture_and_an_encoder(lacking: str) -> None:
    assert not check(Manifest.model_validate(MANIFEST | {"inputs": INPUTS}))
    inputs = {name: source for name, source in INPUTS.items() if name != lacking}
    components = {role: at for role, at in MANIFEST["components"].items() if role != lacking}
    [fault] = check(Manifest.model_validate(MANIFEST | {"inputs": inputs, "components": components}))
    assert fault == "inputs: mask and masked_image go together, and with a component encoder"


def test_the_shape_of_the_mask_is_that_of_the_network(tmp_path: Path) -> None:
    models = models_that_inpaint(tmp_path)
    assert load(models).get(NAME).manifest.is_inpainting
    file = models / "repository" / f"{NAME}_denoiser" / "config.pbtxt"
    file.write_text(file.read_text().replace("dims: [1, 8, 8]", "dims: [2, 8, 8]"))
    with pytest.raises(ManifestError, match=r"components\.denoiser: config\.pbtxt: mask"):
        load(models)


def test_it_offers_inpainting_alone(tmp_path: Path) -> None:
    runtime = SimulatedRuntime(1, 0.0, 0.0)
    message = model_message(small_pipeline(tmp_path, inputs=INPUTS), runtime, True)
    assert list(message.tasks) == [models_pb2.TASK_INPAINTING]
    assert models_pb2.TASK_TEXT_TO_IMAGE in model_message(small_pipeline(tmp_path), runtime, True).tasks


def test_it_is_the_default_only_where_no_model_draws_from_text(tmp_path: Path) -> None:
    inpaints, draws = small_pipeline(tmp_path, name="a", inputs=INPUTS), small_pipeline(tmp_path, name="b")
    assert Catalog([inpaints, draws]).default == "b"
    assert Catalog([inpaints, draws], "a").default == "a"
    assert Catalog([inpaints]).default == "a"


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({}, ["spec.init_image", "spec.mask"]),
        ({"init_image": IMAGE}, ["spec.mask"]),
        ({"mask": IMAGE}, ["spec.init_image"]),
        ({"strength": 0.5}, ["spec.init_image", "spec.mask"]),
    ],
)
def test_a_request_needs_a_picture_and_a_mask(tmp_path: Path, spec: dict[str, object], fields: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        resolve_request(request(**spec), small_catalog(tmp_path, inputs=INPUTS), LIMITS)
    assert [fault.field for fault in refused.value.violations] == fields
    assert all("only develops a part of a picture anew" in fault.description for fault in refused.value.violations)


def test_what_stands_for_all_of_a_picture_does_so_over_grpc_and_http(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="a fully transparent PNG stands for all of it"):
        resolve_request(request(init_image=IMAGE), small_catalog(tmp_path, inputs=INPUTS), LIMITS)
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(file, "PNG")
    assert has_alpha(file.getvalue()), "as HTTP requires"
    assert (decode_mask(file.getvalue(), 1 << 10, 8, 8) == 255).all()


@pytest.mark.parametrize(("given", "strength", "first_step"), [(None, 1.0, 0), (0.7, 0.7, 3), (1.0, 1.0, 0)])
def test_the_part_is_drawn_from_noise_by_default(
    tmp_path: Path, given: float | None, strength: float, first_step: int
) -> None:
    message = request(init_image=IMAGE, mask=OTHER_IMAGE, strength=given, num_inference_steps=10)
    spec = resolve_request(message, small_catalog(tmp_path, inputs=INPUTS), LIMITS).spec
    assert (spec.strength, spec.first_step) == (strength, first_step)


def test_a_mask_is_drawn_at_one_half_and_shrunk_by_its_first_pixels() -> None:
    mask = np.zeros((4, 6), np.uint8)
    mask[0, 0], mask[0, 2], mask[2, 4], mask[3, 5], mask[1] = 128, 127, 255, 255, 255
    assert sampled_mask(mask, (2, 3)).tolist() == [[[1, 0, 0], [0, 0, 1]]]


def test_the_part_that_is_developed_anew_is_grey_for_the_encoder() -> None:
    pixels = np.full((2, 2, 3), 200, np.uint8)
    kept = encoder_image(pixels, np.array([[0, 127], [128, 255]], np.uint8))
    assert np.array_equal(kept[:, 0], encoder_image(pixels)[:, 0])
    assert not kept[:, 1].any()


PICTURE = InitImage("photo", np.full((64, 64, 3), 200, np.uint8), np.full((64, 64), 255, np.uint8), "mask")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    pipeline = small_pipeline(tmp_path, inputs=INPUTS)
    table = compile_table(SamplerSpec("ddim"), pipeline.schedule, "v_prediction", 10, 0)
    return Job(1, "a/b", Priority.STANDARD, pipeline, (4, 8, 8), table, 7, 1.0, ((4, 5),), image=PICTURE)


def keys_of(job: Job) -> dict[str, str]:
    return dict(job.as_output(lambda pipeline, component, shape: component.value).encoder_keys)


def late(job: Job) -> Job:
    """The same with a strength below 1."""
    return replace(job, table=compile_table(SamplerSpec("ddim"), job.pipeline.schedule, "v_prediction", 10, 4))


def test_what_is_encoded_of_a_picture(job: Job) -> None:
    whole, kept = PICTURE.name(job.pipeline), PICTURE.masked_name(job.pipeline)
    start = Snapshot(5, np.zeros((4, 8, 8), np.float32), np.zeros((4, 8, 8), np.float32))
    assert keys_of(job) == {kept: Component.ENCODER}, "it begins from noise alone"
    assert keys_of(late(job)) == {whole: Component.ENCODER, kept: Component.ENCODER}
    assert keys_of(replace(late(job), start=start)) == {kept: Component.ENCODER}
    assert late(job).encoder_inputs[whole] is PICTURE.pixels
    assert late(job).encoder_inputs[kept].mask is PICTURE.mask
    other = replace(PICTURE, mask_digest="other")
    assert other.masked_name(job.pipeline) != kept
    assert other.name(job.pipeline) == whole


def test_both_encodings_of_a_picture_have_their_own_noise(job: Job) -> None:
    encoding = {name: np.full((4, 8, 8), value, np.float32) for name, value in (("mean", 2.0), ("std", 0.5))}
    clean, given = (
        PICTURE.clean_latent(job.pipeline, encoding, 7),
        PICTURE.masked_image(job.pipeline, encoding, 7),
    )
    assert clean.mask is None, "its denoiser keeps the rest by itself"
    assert np.array_equal(clean.clean, 2 + np.float32(0.5) * gaussian(7, POSTERIOR, 0, (4, 8, 8)))
    assert np.array_equal(given.latent, 2 + np.float32(0.5) * gaussian(7, POSTERIOR, 1, (4, 8, 8)))
    assert np.array_equal(given.mask, np.ones((1, 8, 8), np.float32))


SHAPE, CONTEXTS = (2, 4, 4), {"last_hidden_state": (3, 5)}
CONTEXT = {"last_hidden_state": np.zeros((3, 5), np.float32)}


def masked(value: float) -> RowMaskedImage:
    return RowMaskedImage(np.full((1, 4, 4), value, np.float32), np.full(SHAPE, -value, np.float32))


def test_each_row_has_the_mask_and_the_picture_of_its_output(job: Job) -> None:
    latents = Latents(2, SHAPE, CONTEXTS, 50, INPUTS)
    one, two = (
        latents.claim(late(job).table, 1, 1.0, [CONTEXT], picture=CleanLatent(np.zeros(SHAPE), None), masked_image=at)
        for at in (masked(1), masked(2))
    )
    rows = latents.rows(np.array([two, one, two]), np.array([0, 0, 1]), np.array([4, 4, 4]))
    assert rows["mask"].shape == (3, 1, 4, 4)
    assert rows["mask"][:, 0, 0, 0].tolist() == [2, 1, 2]
    assert rows["masked_image"][:, 1, 0, 0].tolist() == [-2, -1, -2]


def test_shapes_of_open_axes_are_those_of_the_latent(tmp_path: Path) -> None:
    specs = [InputSpec(name, (count, -1, -1)) for name, count in (("sample", 4), ("mask", 1), ("masked_image", 4))]
    tall = at_sizes(specs, small_pipeline(tmp_path, inputs=INPUTS))[1]
    assert [spec.shape for spec in tall] == [(4, 12, 8), (1, 12, 8), (4, 12, 8)]


CONFIG = """
name: "small_denoiser"
max_batch_size: 8
input { name: "sample" data_type: TYPE_FP32 dims: [4, -1, -1] }
input { name: "mask" data_type: TYPE_FP32 dims: [1, -1, -1] }
input { name: "masked_image" data_type: TYPE_FP32 dims: [4, -1, -1] }
"""


def test_a_triton_repository_warms_up_masks_at_all_sizes(tmp_path: Path) -> None:
    file = tmp_path / "config.pbtxt"
    file.write_text(CONFIG)
    config = export.read(file)
    use = export.ModelUse(tuple(export.PictureShapes((4, edge, 8), (3, 8 * edge, 64)) for edge in (8, 12)))
    assert [dims["mask"] for dims in export.dims_by_size(config, use)] == [(1, 8, 8), (1, 12, 8)]
    made = export.for_gpu(config, 1, export.Accelerator.TENSORRT, use)
    assert {at["max"]["mask"] for at in export.profiles(made)} == {(8, 1, 8, 8), (8, 1, 12, 8)}


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


async def test_a_request_that_another_revision_accepted_is_refused_without_a_mask(pool: Executor) -> None:
    images = uploads()
    for digest, colour in (("photo", 90), ("mask", 255)):
        await images.put("ann", digest, png(colour), PictureFile("image/png", 8, 8))
    loader = InitImages(images, pool, 1 << 20)
    spec = replace(SPEC, width_px=8, height_px=8, init_image="photo", mask="mask")
    loaded = await loader.load("ann", spec, needs_mask=True)
    assert loaded is not None
    assert (loaded.digest, loaded.mask_digest) == ("photo", "mask")
    for lacking in (replace(spec, mask=""), replace(spec, init_image="", mask="")):
        with pytest.raises(InvalidRequestError) as refused:
            await loader.load("ann", lacking, needs_mask=True)
        assert [fault.field for fault in refused.value.violations] == ["spec.mask"]
