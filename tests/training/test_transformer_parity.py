"""Exported folders of FLUX and Stable Diffusion 3 behind the server's engine against diffusers' pipelines, to 1/255.

A part of the cells runs in CI; `SAFELIGHT_ALL_PARITY=1 make test-training` runs all of them.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safelight_server.export.exporter import export, round_weights
from safelight_server.export.plan import ExportOptions
from safelight_server.sampler import gaussian

from tests.training import folders
from tests.training.test_image_parity import Pixels, Served, off

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
PROMPTS = ("a red dragon, wow! 8k!!", "an old castle at night in the water of a small city, sharp gold", "")
NEGATIVE = "blurry, ugly!"
SIZES = ((16, 24), (24, 16))
SEEDS = [5, 6]
EVERY = bool(os.environ.get("SAFELIGHT_ALL_PARITY"))
LEAST_CONTRAST = 8
"""Standard deviation of a picture's bytes, below which it may tell nothing."""
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


class Pair:
    """A pipeline in torch, and its export behind the server's engine."""

    def __init__(self, place: Path, pipeline: DiffusionPipeline) -> None:
        torch.set_num_threads(1)
        pipeline.save_pretrained(place / "folder")
        export(place / "folder", place / "models", ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES))
        for name in PARTS:
            if hasattr(pipeline, name):
                round_weights(getattr(pipeline, name))
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.served = pipeline, Served(place / "models")
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

    def theirs(self, prompt: str, num_steps: int, size: tuple[int, int], seed: int, **more: Any) -> Image.Image:
        noise = torch.from_numpy(gaussian(seed, 0, 0, (16, size[1] // 2, size[0] // 2)))[None]
        if self.is_flux:
            noise = self.pipeline._pack_latents(noise, *noise.shape)
        return self.pipeline(
            prompt,
            num_inference_steps=num_steps,
            width=size[0],
            height=size[1],
            latents=noise,
            max_sequence_length=folders.T5_TOKENS,
            **more,
        ).images[0]


@pytest.fixture(scope="module", params=["schnell", "dev", "sd3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kinds = {
        "schnell": lambda: folders.flux_pipeline(is_distilled=False),
        "dev": lambda: folders.flux_pipeline(is_distilled=True),
        "sd3": folders.sd3_pipeline,
    }
    return Pair(tmp_path_factory.mktemp(request.param), kinds[request.param]())


def same(ours: list[Pixels], references: list[Image.Image]) -> None:
    for picture, reference in zip(ours, references, strict=True):
        assert picture.std() > LEAST_CONTRAST
        assert off(picture, reference) <= 1


CELLS = list(itertools.product(PROMPTS, (1, 4, 20), SIZES))
CI_CELLS = [CELLS[0], CELLS[3], CELLS[8], CELLS[15]]


@pytest.mark.parametrize(("prompt", "num_steps", "size"), CELLS if EVERY else CI_CELLS)
def test_a_generation_is_that_of_diffusers(pair: Pair, prompt: str, num_steps: int, size: tuple[int, int]) -> None:
    distilled = pair.pipeline.transformer.config.get("guidance_embeds", False)
    for scale, negative in ((1.0, ""), (4.5, ""), (4.5, NEGATIVE)):
        if distilled:
            more = {"guidance_scale": scale}
        elif pair.is_flux:
            more = {"true_cfg_scale": scale, "negative_prompt": negative}
        else:
            more = {"guidance_scale": scale, "negative_prompt": negative}
        ours = pair.ours(prompt, scale, num_steps, size, negative=negative)
        same(ours, [pair.theirs(prompt, num_steps, size, seed, **more) for seed in SEEDS])
        if distilled and negative:
            break


def test_prompts_guidance_and_size_reach_the_denoiser(pair: Pair) -> None:
    """Else the comparison above would hold for networks that read nothing."""
    first, size = pair.ours(PROMPTS[0], 1.0, 4, SIZES[0])[0], SIZES[0]
    for other in (pair.ours(PROMPTS[1], 1.0, 4, size), pair.ours(PROMPTS[0], 4.5, 4, size)):
        assert off(other[0], Image.fromarray(first)) > 1
