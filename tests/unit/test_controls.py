"""Control networks: what the manifest says of them, how they are verified, and their pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safelight_server.cache.images import Images
from safelight_server.cache.namespaces import Namespaces
from safelight_server.catalog import export
from safelight_server.catalog.checks import check
from safelight_server.catalog.manifest import CONTROL_INPUTS, Manifest
from safelight_server.cli.command import CommandError
from safelight_server.cli.export import export as export_command
from safelight_server.cli.generate import parse_controls
from safelight_server.domain.errors import InvalidRequestError, NotFoundError
from safelight_server.domain.request import ControlUse
from safelight_server.domain.uploads import PictureFile
from safelight_server.export.options import AdapterLayers
from safelight_server.export.source import ExportError
from safelight_server.generations.init_images import InitImages
from safelight_server.runtime.verification import InputSpec, at_sizes, example, warm_up
from safelight_server.sampler import controlled_steps
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.sealed import Sealer
from safelight_server.storage.tiers import Tier, Tiers

from tests.support.pipelines import MANIFEST, small_pipeline
from tests.support.stores import Numbers
from tests.support.streams import SPEC

INPUTS = {**Manifest.model_validate(MANIFEST).inputs, **CONTROL_INPUTS}


def test_the_names_in_their_order_decide_pixels_and_none_leaves_the_digest_as_it_was(tmp_path):
    plain = small_pipeline(tmp_path)
    turned = [
        small_pipeline(tmp_path, controls=names, inputs=INPUTS) for names in (["edges", "depth"], ["depth", "edges"])
    ]
    assert len({pipeline.digest for pipeline in (plain, *turned)}) == 3
    assert small_pipeline(tmp_path, controls=[]).digest == plain.digest


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"controls": ["edges"]}, "goes with inputs of both control_images and control_scales"),
        ({"inputs": INPUTS}, "goes with inputs of both control_images and control_scales"),
        ({"controls": ["edges", "edges"], "inputs": INPUTS}, "has a name twice"),
    ],
)
def test_names_and_inputs_go_together(changes, fault):
    assert check(Manifest.model_validate(MANIFEST | changes)) == [f"controls: {fault}"]


def specs():
    return [
        InputSpec("sample", (4, -1, -1)),
        InputSpec("control_images", (2, 3, -1, -1)),
        InputSpec("control_scales", (2,)),
    ]


def test_examples_have_rows_with_all_with_some_and_with_no_control(tmp_path):
    pipeline = small_pipeline(tmp_path, controls=["edges", "depth"], inputs=INPUTS)
    square, tall = at_sizes(specs(), pipeline)
    assert [spec.shape for spec in square] == [(4, 8, 8), (2, 3, 64, 64), (2,)]
    assert [spec.shape for spec in tall] == [(4, 12, 8), (2, 3, 96, 64), (2,)]
    assert example(square, 1)["control_scales"].all(), "a row alone is not verified with a network that rests"
    acting = example(square, 8)["control_scales"] != 0
    assert {tuple(row) for row in acting.tolist()} == {(True, True), (True, False), (False, True), (False, False)}
    assert not example(specs(), 3)["control_scales"].any(), "the size of a picture is not known there"


async def test_costs_are_those_of_rows_without_controls():
    seen = []

    async def call(inputs):
        seen.append(bool(inputs["control_scales"].any()))
        return {"prediction": inputs["control_scales"]}

    curve = await warm_up(call, [InputSpec("control_scales", (2,))], 2)
    assert curve.rows == (1, 2)
    assert seen == [True, True, False, False, False, True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("num_steps", "start", "end", "steps"),
    [
        (10, 0.0, 1.0, range(10)),
        (10, 0.25, 0.75, range(3, 7)),
        (10, 0.2, 0.8, range(2, 8)),
        (4, 0.9, 1.0, range(0)),
        (1, 0.0, 0.5, range(0)),
    ],
)
def test_a_step_is_controlled_that_lies_in_the_share_as_a_whole(num_steps, start, end, steps):
    assert controlled_steps(num_steps, start, end) == steps


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def uploads() -> Images:
    keyring = Keyring.random()
    tiers = Tiers([Tier(MemoryStore(1 << 20))], Sealer(keyring, lambda: 1000.0), Numbers().metrics)
    return Images(tiers, keyring, Namespaces(keyring, {}), ttl_s=600.0, max_tenant_bytes=1 << 20)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


async def test_the_pictures_of_controls_are_those_of_their_tenant_at_the_size_of_the_generation(pool):
    images = uploads()
    loader = InitImages(images, pool, 1 << 20)
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:, 10:] = 255
    await images.put("ann", "d1", png(pixels), PictureFile("image/png", 20, 40))
    control = ControlUse("edges", "d1", 0.5, 0.25, 0.75)
    spec = replace(SPEC, num_inference_steps=8, width_px=10, height_px=10, controls=(control,))
    [loaded] = await loader.load_controls("ann", spec, ("depth", "edges"))
    assert (loaded.place, loaded.scale, loaded.steps) == (1, 0.5, range(2, 6))
    assert loaded.pixels.shape == (10, 10, 3)
    assert loaded.pixels[5, [0, 9], 0].tolist() == [0, 255], "cut to the shape of the picture, and scaled"
    with pytest.raises(NotFoundError) as missing:
        await loader.load_controls("bob", spec, ("depth", "edges"))
    assert missing.value.reason == "IMAGE_NOT_FOUND"
    assert [fault.field for fault in missing.value.violations] == ["spec.controls[edges].image"]
    with pytest.raises(NotFoundError) as missing:
        await loader.load_controls("ann", spec, ("depth",))
    assert missing.value.reason == "CONTROL_NOT_FOUND"
    with pytest.raises(InvalidRequestError) as refused:
        await InitImages(images, pool, 100).load_controls("ann", spec, ("edges",))
    assert [fault.field for fault in refused.value.violations] == ["spec.controls[edges].image"]
    assert await loader.load_controls("ann", replace(spec, controls=()), ()) == ()


@pytest.mark.parametrize("text", ["edges", "=folder", "edges="])
def test_a_control_network_that_is_not_understood_is_refused_on_the_command_line(tmp_path, text):
    with pytest.raises(ExportError, match=f"--control {text}: must be NAME=FOLDER"):
        export_command(tmp_path, control=[text])


def test_layers_of_adapters_without_room_for_them_are_refused_on_the_command_line(tmp_path):
    with pytest.raises(ExportError, match="--adapter-layers: goes with --adapter-rank; leave it out"):
        export_command(tmp_path, adapter_layers=AdapterLayers.ALL)


CONFIG = """
name: "small_denoiser"
max_batch_size: 8
input { name: "sample" data_type: TYPE_FP32 dims: [4, -1, -1] }
input { name: "control_images" data_type: TYPE_FP32 dims: [2, 3, -1, -1] }
input { name: "control_scales" data_type: TYPE_FP32 dims: [2] }
"""


def test_a_triton_repository_warms_up_pictures_at_all_sizes_and_refuses_tensorrt(tmp_path):
    file = tmp_path / "config.pbtxt"
    file.write_text(CONFIG)
    config = export.read(file)
    sizes = tuple(export.PictureShapes((4, edge, 8), (3, 8 * edge, 64)) for edge in (8, 12))
    use = export.ModelUse(sizes)
    assert [dims["control_images"] for dims in export.dims_by_size(config, use)] == [(2, 3, 64, 64), (2, 3, 96, 64)]
    assert export.for_cpu(config, use).model_warmup
    assert export.for_gpu(config, 1, export.Accelerator.ONNXRUNTIME, use).model_warmup
    for accelerator in (export.Accelerator.TENSORRT, export.Accelerator.PLAN):
        with pytest.raises(export.RepositoryError, match=r"small_denoiser: its control networks .* --accelerator onnx"):
            export.for_gpu(config, 1, accelerator, use)


def test_controls_on_the_command_line():
    found = parse_controls(["edges=a.png", "depth=generations/x:0.5", "pose=b.png:1:0.2:0.8"])
    assert [(at.name, str(at.image), at.scale, at.start, at.end) for at in found] == [
        ("edges", "a.png", None, None, None),
        ("depth", "generations/x", 0.5, None, None),
        ("pose", "b.png", 1.0, 0.2, 0.8),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "edges",
        "=a.png",
        "edges=",
        "edges=a.png:x",
        "edges=a.png:1:0:1:2",
        "edges=:1",
        "edges=a.png:0.8:x",
        "edges=a.png:1:",
    ],
)
def test_a_control_that_is_not_understood_is_refused_on_the_command_line(text):
    with pytest.raises(CommandError, match="must be NAME=FILE, or NAME=FILE:SCALE:START:END"):
        parse_controls([text])
