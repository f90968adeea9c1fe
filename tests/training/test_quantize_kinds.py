"""`safelight export --quantize int8` of each kind of model, with small random networks: what is made, and served.

CI has a transformer, and one UNet with all that a denoiser can be given beside prompts. `SAFELIGHT_ALL_PARITY=1 make
test-training` has the other families, and room for adapters in all layers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safelight import Client, Control
from safelight_server.app.server import serving
from safelight_server.catalog import catalog
from safelight_server.catalog.catalog import DATA_FILE
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.export import onnx_file
from safelight_server.export.exporter import export
from safelight_server.export.options import AdapterLayers, ExportOptions
from safelight_server.quantization import quantize
from safelight_server.quantization.quality import QualityOptions, psnr_db
from safelight_server.settings import load

from tests.support.adapters import write_adapter
from tests.training import folders
from tests.training.cells import EVERY
from tests.training.test_image_parity import picture_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
SIZES = ((16, 16), (32, 16))
PROMPT, STEPS, RANK = "a red potion", 4, 4
NAMES = ("edges", "depth")
GATE = QualityOptions(num_pictures=8)
Asked = dict[str, Any]
Options = dict[str, Any]


def everything(place: Path) -> Options:
    """A UNet of 9 channels, a control network, an IP-Adapter, room for adapters, and two sizes."""
    pipeline = folders.inpainting_pipeline(folders.pipeline())
    pipeline.save_pretrained(place / "folder")
    folders.control_network(folders.unet(), 0).save_pretrained(place / "edges")
    return {
        "sizes": SIZES,
        "adapter_rank": RANK,
        "adapter_layers": AdapterLayers.ATTENTION,
        "controls": (("edges", place / "edges"),),
        "image_prompt": folders.ip_adapter(pipeline.unet, place / "ip"),
    }


def conditioned(place: Path) -> Options:
    """Two control networks, and room for adapters in all layers."""
    pipeline = folders.pipeline()
    pipeline.save_pretrained(place / "folder")
    for seed, name in enumerate(NAMES):
        folders.control_network(pipeline.unet, seed).save_pretrained(place / name)
    return {
        "adapter_rank": RANK,
        "adapter_layers": AdapterLayers.ALL,
        "controls": tuple((name, place / name) for name in NAMES),
    }


def flux(place: Path) -> Options:
    """Like FLUX.1-dev, which is given the guidance scale, and whose steps differ by size."""
    folders.flux_pipeline(is_distilled=True).save_pretrained(place / "folder")
    return {"sizes": SIZES, "adapter_rank": RANK}


def sdxl(place: Path) -> Options:
    folders.sdxl_pipeline().save_pretrained(place / "folder")
    return {"adapter_rank": RANK, "adapter_layers": AdapterLayers.ATTENTION}


def sd3(place: Path) -> Options:
    folders.sd3_pipeline().save_pretrained(place / "folder")
    return {"adapter_rank": RANK}


IN_CI: tuple[Callable[[Path], Options], ...] = (everything, flux)
KINDS = (*IN_CI, conditioned, sdxl, sd3) if EVERY else IN_CI


@dataclass(frozen=True)
class Made:
    """A folder of models with a float and a quantized revision of one pipeline, and requests for them."""

    models: Path
    of_float: Pipeline
    int8: Pipeline
    asked: list[Asked]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    place, kind = tmp_path_factory.mktemp(request.param.__name__), request.param
    options = ExportOptions("tiny", licence="CC0-1.0", steps=STEPS, max_rows=4, **kind(place))
    with pytest.MonkeyPatch.context() as patch:
        if kind is everything:  # one kind has its weights in a file beside the network, as large ones have
            patch.setattr(onnx_file, "EXTERNAL_BYTES", 8000)
        export(place / "folder", place / "models", options)
    quantize.quantize(place / "models" / "pipelines" / "tiny" / "1" / "pipeline.json", GATE)
    found = catalog.load(place / "models")
    of_float, int8 = found.get("tiny"), found.get("tiny@int8")
    return Made(place / "models", of_float, int8, requests(of_float, place))


def requests(pipeline: Pipeline, place: Path) -> list[Asked]:
    """One of each size, and one for each thing that the denoiser can be given beside a prompt."""
    manifest, needed = pipeline.manifest, {}
    photo, mask = place / "photo.png", place / "mask.png"
    picture_of(SIZES[0]).save(photo)
    if manifest.is_inpainting:
        Image.fromarray(np.repeat([[255, 0]], 8, axis=1).repeat(16, axis=0).astype(np.uint8)).save(mask)
        needed = {"init_image": photo, "mask": mask}
    asked: list[Asked] = [{"width": at.width_px, "height": at.height_px} for at in manifest.sizes]
    if manifest.adapters is not None:
        write_adapter(place / "models" / "adapters", "style", arrays=lora(pipeline))
        asked.append({"adapters": {"style": 1.0}})
    if manifest.controls:
        asked.append({"controls": [Control(name, photo) for name in manifest.controls]})
    if manifest.image_prompt is not None:
        asked.append({"image_prompt": photo, "image_prompt_scale": 0.8})
    return [one | needed for one in asked]


def lora(pipeline: Pipeline) -> dict[str, np.ndarray]:
    """An adapter of all layers that have room, in peft's keys, that changes pictures much."""
    assert pipeline.manifest.adapters is not None
    rng, arrays = np.random.default_rng(1), {}
    for target in pipeline.manifest.adapters.targets:
        kernel = () if target.kernel is None else (target.kernel, target.kernel)
        ones = () if target.kernel is None else (1, 1)
        for part, shape in (("A", (2, target.inputs, *kernel)), ("B", (target.outputs, 2, *ones))):
            size = 0.6 / np.sqrt(np.prod(shape[1:]))
            arrays[f"base_model.model.{target.name}.lora_{part}.weight"] = (size * rng.standard_normal(shape)).astype(
                np.float32
            )
    return arrays


def test_the_revision_has_a_quantized_denoiser_and_its_figures(made: Made) -> None:
    quantized = made.int8.manifest.quantization
    assert quantized is not None
    assert quantized.quality.num_pictures == GATE.num_pictures
    assert quantized.quality.psnr_db >= GATE.min_psnr_db
    denoiser = made.int8.manifest.components[Component.DENOISER]
    assert denoiser.row_bytes > 0
    files = [at.files[Component.DENOISER] for at in (made.of_float, made.int8)]
    assert [file.with_name(DATA_FILE).exists() for file in files] == [denoiser.data_sha256 is not None] * 2
    sizes = [sum(part.stat().st_size for part in file.parent.iterdir()) for file in files]
    weights = [at for at in onnx.load(files[1]).graph.initializer if at.data_type == onnx.TensorProto.INT8]
    assert len(weights) > 8, sizes


async def test_both_revisions_make_near_pictures_whatever_they_are_given_alone_and_together(made: Made) -> None:
    settings = load(port=0, models_dir=made.models, log_level="error", num_instances=1)
    async with serving(settings) as running, Client(running.address) as client:

        async def picture(model: str, asked: Asked) -> np.ndarray:
            stream = client.generate(PROMPT, model=model, seed=7, cache="bypass", **asked)
            return np.asarray(await stream.image())[None]

        of_float = [await picture("tiny", asked) for asked in made.asked]
        int8 = [await picture("tiny@int8", asked) for asked in made.asked]
        together = await asyncio.gather(*(picture("tiny@int8", asked) for asked in made.asked))
        for one, other in zip(int8, together, strict=True):
            assert np.array_equal(one, other)
        near = [psnr_db(one, other)[0] for one, other in zip(of_float, int8, strict=True)]
        assert min(near) >= GATE.min_psnr_db, near
        for asked, one, other in zip(made.asked, of_float, int8, strict=True):
            if "width" not in asked:  # what is given changes a picture more than the quantization does
                assert psnr_db(other, int8[0])[0] < psnr_db(one, other)[0], asked
