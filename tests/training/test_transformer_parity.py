"""Exported folders of FLUX and Stable Diffusion 3 behind the server's engine against diffusers' pipelines, to 1/255.

CI has FLUX.1-dev on ONNX Runtime, the others on torch, and a part of the cells. `SAFELIGHT_ALL_PARITY=1 make
test-training` has all of them on both, all cells, and pictures to start from.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from PIL import Image
from safelight_server.catalog import catalog
from safelight_server.export.exporter import denoiser_of, export, round_weights, text_encoder_of, token_ids
from safelight_server.export.options import ExportFormat, ExportOptions
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.torch_runtime import TorchRuntime
from safelight_server.sampler import INITIAL, POSTERIOR, gaussian

from tests.training import folders
from tests.training.cells import EVERY
from tests.training.test_image_parity import Pixels, Served, off, picture_of, png

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
PROMPTS = ("a red dragon, wow! 8k!!", "an old castle at night in the water of a small city, sharp gold", "")
NEGATIVE = "blurry, ugly!"
SIZES = ((16, 24), (24, 16))
SEEDS = [5, 6]
LEAST_CONTRAST = 8
"""Standard deviation of a picture's bytes, below which it may tell nothing."""
MOST_CLIPPED = 0.5
"""Share of bytes at an end, which hide differences."""
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


class ServedOnTorch(Served):
    """An exported pipeline behind the server's engine, on the torch runtime."""

    def __init__(self, models: Path) -> None:
        self.catalog = catalog.load(models, weights="torch")
        self.pipeline = self.catalog.get("tiny")
        self.runtime = TorchRuntime(self.catalog, TorchOptions(num_instances=1))
        asyncio.run(self.runtime.start())


class Pair:
    """A pipeline in torch, and its export behind the server's engine."""

    def __init__(self, place: Path, pipeline: DiffusionPipeline, format: ExportFormat) -> None:
        torch.set_num_threads(1)
        pipeline.save_pretrained(place / "folder")
        if not EVERY:
            folders.spare_encoder(place / "folder", 16)
        options = ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES, format=format, max_rows=8)
        export(place / "folder", place / "models", options)
        for name in PARTS:
            if hasattr(pipeline, name):
                round_weights(getattr(pipeline, name))
        pipeline.set_progress_bar_config(disable=True)
        served = ServedOnTorch if format is ExportFormat.TORCH else Served
        self.pipeline, self.served = pipeline, served(place / "models")
        self.is_flux = self.served.pipeline.manifest.family == "flux"
        self.spacing = "trailing" if self.is_flux else "linspace"

    def ours(self, prompt: str, guidance: float, num_steps: int, size: tuple[int, int], **more: Any) -> list[Pixels]:
        return self.served.pictures(
            prompt,
            SEEDS,
            guidance,
            "flow_match_euler",
            more.pop("strength", 1.0),
            spacing=self.spacing,
            size=size,
            num_steps=num_steps,
            **more,
        )

    def theirs(
        self, prompt: str, scale: float, negative: str, num_steps: int, size: tuple[int, int], seed: int
    ) -> Image.Image:
        """Diffusers' picture of a seed."""
        noise = torch.from_numpy(gaussian(seed, INITIAL, 0, (16, size[1] // 2, size[0] // 2)))[None]
        if self.is_flux:
            noise = self.pipeline._pack_latents(noise, *noise.shape)
        more = self.guided(scale, negative)
        return self.pipeline(
            prompt, num_inference_steps=num_steps, width=size[0], height=size[1], latents=noise, **more
        ).images[0]

    def guided(self, scale: float, negative: str) -> dict[str, Any]:
        """How diffusers' pipeline is asked for guidance."""
        more: dict[str, Any] = {"max_sequence_length": folders.T5_TOKENS}
        if self.pipeline.transformer.config.get("guidance_embeds", False):
            return more | {"guidance_scale": scale}
        return more | {"true_cfg_scale" if self.is_flux else "guidance_scale": scale, "negative_prompt": negative}

    def theirs_from(
        self, init: Image.Image, strength: float, patch: pytest.MonkeyPatch, scale: float, num_steps: int, seed: int
    ) -> Image.Image:
        """Diffusers' picture of a seed from a picture: it draws the noise of ours."""
        name = "flux.pipeline_flux" if self.is_flux else "stable_diffusion_3.pipeline_stable_diffusion_3"
        for module, stream in ((f"pipelines.{name}_img2img", INITIAL), ("models.autoencoders.vae", POSTERIOR)):
            noise = torch.from_numpy(gaussian(seed, stream, 0, (16, init.height // 2, init.width // 2)))[None]
            patch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, _noise=noise, **__: _noise)
        parts = {**self.pipeline.components}
        made = (FluxImg2ImgPipeline if self.is_flux else StableDiffusion3Img2ImgPipeline)(**parts)
        made.set_progress_bar_config(disable=True)
        more = self.guided(scale, "") | {"width": init.width, "height": init.height}
        return made(PROMPTS[0], image=init, strength=strength, num_inference_steps=num_steps, **more).images[0]


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "dev": lambda: folders.flux_pipeline(is_distilled=True),
    "schnell": lambda: folders.flux_pipeline(is_distilled=False),
    "sd3": folders.sd3_pipeline,
}


PAIRS = list(itertools.product(KINDS, (ExportFormat.ONNX, ExportFormat.TORCH)))
CI_PAIRS = [("dev", ExportFormat.ONNX), ("schnell", ExportFormat.TORCH), ("sd3", ExportFormat.TORCH)]


@pytest.fixture(scope="module", params=PAIRS if EVERY else CI_PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, format = request.param
    return Pair(tmp_path_factory.mktemp(kind), KINDS[kind](), format)


def same(ours: list[Pixels], references: list[Image.Image]) -> None:
    for picture, reference in zip(ours, references, strict=True):
        assert picture.std() > LEAST_CONTRAST
        assert np.isin(picture, (0, 255)).mean() < MOST_CLIPPED
        assert off(picture, reference) <= 1


CELLS = list(itertools.product(PROMPTS, (1, 4, 20), SIZES))
CI_CELLS = [CELLS[0], CELLS[3], CELLS[8], CELLS[17]]


@pytest.mark.parametrize(("prompt", "num_steps", "size"), CELLS if EVERY else CI_CELLS)
def test_a_generation_is_that_of_diffusers(pair: Pair, prompt: str, num_steps: int, size: tuple[int, int]) -> None:
    for scale, negative in ((1.0, ""), (4.5, ""), (4.5, NEGATIVE)):
        ours = pair.ours(prompt, scale, num_steps, size, negative=negative)
        same(ours, [pair.theirs(prompt, scale, negative, num_steps, size, seed) for seed in SEEDS])


@pytest.mark.skipif(not EVERY, reason="SAFELIGHT_ALL_PARITY=1 make test-training compares it")
@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0])
def test_development_from_a_picture_is_that_of_diffusers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    """Strengths of which a whole number of 4 steps is left: diffusers rounds the other way for these pipelines."""
    size = SIZES[0]
    init = picture_of(size)
    ours = pair.ours(PROMPTS[0], 4.5, 4, size, strength=strength, init=png(init))
    same(ours, [pair.theirs_from(init, strength, monkeypatch, 4.5, 4, seed) for seed in SEEDS])


def test_prompts_guidance_and_size_reach_the_denoiser(pair: Pair) -> None:
    """Else the comparison above would hold for networks that read nothing."""
    first, size = pair.ours(PROMPTS[0], 1.0, 4, SIZES[0])[0], SIZES[0]
    for other in (pair.ours(PROMPTS[1], 1.0, 4, size), pair.ours(PROMPTS[0], 4.5, 4, size)):
        assert off(other[0], Image.fromarray(first)) > 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_encoders_and_denoiser_are_those_of_diffusers(kind: str) -> None:
    """The wrappers in torch, for the families whose export is compared by `SAFELIGHT_ALL_PARITY=1` alone."""
    pipeline = KINDS[kind]()
    texts, is_flux = [PROMPTS[0], NEGATIVE, ""], kind != "sd3"
    hidden, pooled = text_encoder_of(pipeline)(token_ids(pipeline, texts))
    given = [texts] * (2 if is_flux else 3)
    found = pipeline.encode_prompt(*given, max_sequence_length=folders.T5_TOKENS)
    torch.testing.assert_close(hidden, found[0])
    torch.testing.assert_close(pooled, found[1 if is_flux else 2])
    latent, times = torch.randn(3, 16, 8, 12), torch.tensor([1000.0, 500.0, 20.0])
    more = {"guidance": torch.tensor([3.5, 1.0, 7.0])} if kind == "dev" else {}
    ours = denoiser_of(pipeline)(latent, times, hidden, pooled, **more)
    named = {"encoder_hidden_states": hidden, "pooled_projections": pooled, "return_dict": False, **more}
    if is_flux:
        packed = pipeline._pack_latents(latent, *latent.shape)
        ids = {"txt_ids": found[2], "img_ids": pipeline._prepare_latent_image_ids(3, 4, 6, "cpu", torch.float32)}
        theirs = pipeline.transformer(packed, timestep=times / 1000, **named, **ids)[0]
        theirs = pipeline._unpack_latents(theirs, 16, 24, pipeline.vae_scale_factor)
    else:
        theirs = pipeline.transformer(latent, timestep=times, **named)[0]
    torch.testing.assert_close(ours, theirs)
