"""Exported UNets of 9 channels behind the server's engine against diffusers' inpainting pipelines, to 1/255.

CI has Stable Diffusion on the torch runtime, a part of the cells, and the ONNX file of the denoiser alone, as exporting
the other networks takes most of the time. `SAFELIGHT_ALL_PARITY=1 make test-training` has all cells, SDXL, and both
runtimes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safelight_server.catalog import catalog
from safelight_server.export import loading, plan
from safelight_server.export.exporter import denoiser_of, example_inputs, export, round_weights
from safelight_server.export.onnx_file import check_parity, write_onnx
from safelight_server.export.options import ExportFormat, ExportOptions
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.torch_runtime import TorchRuntime
from safelight_server.sampler import INITIAL, POSTERIOR, STEP, gaussian, steps_left_out

from tests.training import folders
from tests.training.cells import EVERY
from tests.training.test_image_parity import Pixels, Served, off, picture_of, png

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
SAMPLERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}
SIZES = ((16, 24), (32, 16))
OPTIONS = ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES)
FORMAT = ExportFormat.BOTH if EVERY else ExportFormat.TORCH
PROMPTS = ("a red dragon, wow! 8k!!", "an old castle at night in the water of a small city, sharp gold", "wow! ! 42%")
NEGATIVE = "blurry, ugly!"
SEEDS = [5, 6]
LEAST_CONTRAST = 8
"""Standard deviation of a picture's bytes, below which it may tell nothing."""
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


class TorchServed(Served):
    """An export behind the server's engine on the torch runtime."""

    def __init__(self, models: Path) -> None:
        self.catalog = catalog.load(models, weights="torch")
        self.pipeline = self.catalog.get("tiny")
        self.runtime = TorchRuntime(self.catalog, TorchOptions(device="cpu", num_instances=1))
        asyncio.run(self.runtime.start())


class Pair:
    """A pipeline in torch, and its export behind the server's engine."""

    def __init__(self, place: Path, kind: str) -> None:
        torch.set_num_threads(1)
        whole = folders.pipeline() if kind == "sd15" else folders.sdxl_pipeline(latent=(12, 8))
        torch.manual_seed(9)
        unet = UNet2DConditionModel(**plain(whole.unet.config) | {"in_channels": 9}).eval()
        made = StableDiffusionInpaintPipeline if kind == "sd15" else StableDiffusionXLInpaintPipeline
        more = {"requires_safety_checker": False} if kind == "sd15" else {"add_watermarker": False}
        self.pipeline = made(**whole.components | {"unet": unet}, **more)
        self.pipeline.save_pretrained(place / "folder")
        self.scheduler = plain(self.pipeline.scheduler.config) | {"clip_sample": False}
        export(place / "folder", place / "models", replace(OPTIONS, format=FORMAT))
        for name in NETWORKS:
            if hasattr(self.pipeline, name):
                round_weights(getattr(self.pipeline, name))
        self.pipeline.set_progress_bar_config(disable=True)
        self.folder, self.models = place / "folder", place / "models"
        self.served = Served(self.models) if EVERY else TorchServed(self.models)

    def theirs(
        self,
        patch: pytest.MonkeyPatch,
        prompt: str,
        negative: str,
        guidance: float,
        sampler: str,
        strength: float,
        num_steps: int,
        size: tuple[int, int],
        seed: int,
    ) -> Image.Image:
        """Diffusers' picture, with the noise of an output of ours."""
        shape = (4, size[1] // 2, size[0] // 2)
        first = steps_left_out(num_steps, strength)
        # With a strength of 1 the whole picture is not encoded.
        counters = {INITIAL: itertools.count(), STEP: itertools.count(first), POSTERIOR: itertools.count(not first)}

        def drawn(stream: int) -> Any:
            return lambda *_, **__: torch.from_numpy(gaussian(seed, stream, next(counters[stream]), shape))[None]

        for module, stream in (
            ("pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint", INITIAL),
            ("pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint", INITIAL),
            ("schedulers.scheduling_euler_ancestral_discrete", STEP),
            ("models.autoencoders.vae", POSTERIOR),
        ):
            patch.setattr(f"diffusers.{module}.randn_tensor", drawn(stream))
        self.pipeline.scheduler = SAMPLERS[sampler].from_config(self.scheduler, timestep_spacing="leading")
        picture = self.pipeline(
            prompt,
            image=picture_of(size),
            mask_image=mask_of(size),
            negative_prompt=negative or None,
            strength=strength,
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            width=size[0],
            height=size[1],
        ).images[0]
        share = np.asarray(mask_of(size)).astype(float)[..., None] / 255
        whole = share * np.asarray(picture) + (1 - share) * np.asarray(picture_of(size))  # as `apply_overlay` does
        return Image.fromarray(np.round(whole).astype(np.uint8))

    def ours(self, *given: Any, size: tuple[int, int], **more: Any) -> list[Pixels]:
        init, mask = png(picture_of(size)), png(mask_of(size))
        return self.served.pictures(*given, init, mask, spacing="leading", size=size, **more)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it is in a file: a class of diffusers notes which values are defaults, and drops those."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def mask_of(size: tuple[int, int]) -> Image.Image:
    """A mask with hard, soft and ragged edges, which do not follow the latent's pixels."""
    width, height = size
    shares = np.zeros((height, width), np.uint8)
    shares[height // 3 :, : width // 2] = 255
    shares[height // 3 :, width // 2], shares[height // 3] = 127, 128
    shares[::5, 1::3] = 200
    return Image.fromarray(shares)


@pytest.fixture(scope="module", params=["sd15", "sdxl"] if EVERY else ["sd15"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), request.param)


def same(
    pair: Pair,
    patch: pytest.MonkeyPatch,
    prompt: str,
    sampler: str,
    strength: float,
    num_steps: int,
    size: tuple[int, int],
) -> None:
    for guidance, negative in ((1.0, ""), (5.0, ""), (5.0, NEGATIVE)):
        given = {"negative": negative, "num_steps": num_steps, "size": size}
        pictures = pair.ours(prompt, SEEDS, guidance, sampler, strength, **given)
        for seed, picture in zip(SEEDS, pictures, strict=True):
            reference = pair.theirs(patch, prompt, negative, guidance, sampler, strength, num_steps, size, seed)
            assert picture[np.asarray(mask_of(size)) == 255].std() > LEAST_CONTRAST
            assert off(picture, reference) <= 1, (guidance, negative, seed)


def test_the_manifest_says_that_it_inpaints(pair: Pair) -> None:
    manifest = pair.served.pipeline.manifest
    assert manifest.is_inpainting
    assert (manifest.inputs["mask"], manifest.inputs["masked_image"]) == ("mask", "masked_image")
    assert manifest.latent.channels == 4


CELLS = list(itertools.product(SAMPLERS, (0.6, 1.0)))
CI_CELLS = [*CELLS[0:3], CELLS[5], *CELLS[6:8]]


@pytest.mark.parametrize("size", SIZES if EVERY else SIZES[:1], ids=str)
@pytest.mark.parametrize(("sampler", "strength"), CELLS if EVERY else CI_CELLS)
def test_a_part_developed_anew_is_that_of_diffusers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, sampler: str, strength: float, size: tuple[int, int]
) -> None:
    same(pair, monkeypatch, PROMPTS[0], sampler, strength, 5, size)


@pytest.mark.parametrize("num_steps", [1, 4, 20] if EVERY else [4])
@pytest.mark.parametrize("prompt", PROMPTS if EVERY else PROMPTS[1:2])
def test_other_prompts_and_steps_are_those_of_diffusers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, prompt: str, num_steps: int
) -> None:
    same(pair, monkeypatch, prompt, "euler", 1.0, num_steps, SIZES[1])


@pytest.mark.skipif(EVERY, reason="the whole export has compared it")
def test_the_denoiser_is_written_with_its_mask(pair: Pair, tmp_path: Path) -> None:
    made = plan.make(pair.folder, OPTIONS)
    with torch.no_grad():
        pipeline = loading.load(made)
        module = denoiser_of(pipeline).eval()
        round_weights(module)
        # At one size, which takes less time than two.
        examples = [example_inputs("denoiser", pipeline, made, made.latent_sizes[0])]
        file = tmp_path / "tiny_denoiser" / "1" / "model.onnx"
        write_onnx(module, examples, module.outputs, file)
        check_parity(module, examples, module.outputs, file)
    taken = {at.name for at in onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).get_inputs()}
    assert taken == {"sample", "timestep", "encoder_hidden_states", "mask", "masked_image"}


@pytest.mark.skipif(not EVERY, reason="SAFELIGHT_ALL_PARITY=1 make test-training compares it")
def test_the_torch_runtime_inpaints_as_diffusers_does(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "served", TorchServed(pair.models))
    for strength, size in itertools.product((0.6, 1.0), SIZES):
        same(pair, monkeypatch, PROMPTS[0], "ddim", strength, 5, size)
