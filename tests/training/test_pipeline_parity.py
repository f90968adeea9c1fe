"""Whole generations against diffusers' StableDiffusionPipeline: same weights, same noise, to 1/255 before rounding."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safelight_server.export.exporter import export
from safelight_server.export.plan import ExportOptions
from safelight_server.sampler import SamplerSpec, gaussian

from training import networks
from training.icons import caption, sample_spec
from training.recipe import RECIPE
from training.sample import Sampler, shares

STEPS = 8
CASES = [("ddim", None), ("euler", EulerDiscreteScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler),
         ("euler_ancestral", EulerAncestralDiscreteScheduler)]  # fmt: skip


def prompts(count: int) -> list[str]:
    rng = random.Random(3)
    return [caption(sample_spec(rng), rng) for _ in range(count)]


def half(module: torch.nn.Module) -> torch.nn.Module:
    """Weights as the exporter rounds them."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().float()
    return module.eval()


def build(kind: str) -> StableDiffusionPipeline:
    """A random pipeline of the classes of `icons`, or of Stable Diffusion 1.5, small."""
    networks.seed_everything(0)
    tokens = networks.tokenizer(RECIPE, prompts(200))
    text, unet = networks.text_encoder(RECIPE, tokens), networks.denoiser(RECIPE)
    vae: torch.nn.Module = networks.autoencoder(RECIPE, 8, (1, 1, 1, 1, 0))
    if kind == "sd15":
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=RECIPE.text_width,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
        )
    return StableDiffusionPipeline(
        vae=half(vae),
        text_encoder=half(text),
        tokenizer=tokens,
        unet=half(unet),
        scheduler=networks.noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module", params=["icons", "sd15"])
def both(request, tmp_path_factory):
    """The pipeline in torch, and the same exported."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = build(request.param)
    pipeline.save_pretrained(folder / "pipeline")
    export(folder / "pipeline", folder / "models", ExportOptions("tiny", licence="CC0-1.0"))
    sampler = Sampler(folder / "models" / "pipelines" / "tiny" / "1" / "pipeline.json")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, sampler


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("name", "scheduler"), CASES)
def test_a_generation_is_that_of_diffusers(both, name, scheduler, guidance, monkeypatch):
    pipeline, sampler = both
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(networks.noise_schedule().config)
    else:
        pipeline.scheduler = networks.noise_schedule()
    latent = sampler.manifest["latent"]
    shape = (latent["channels"], latent["height"], latent["width"])
    for seed, prompt in enumerate(prompts(8)):
        noise = iter(gaussian(seed, 1, step, shape) for step in range(STEPS))
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor",
            lambda *_args, _noise=noise, **_kwargs: torch.from_numpy(next(_noise))[None],
        )
        theirs = pipeline(
            prompt,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            latents=torch.from_numpy(gaussian(seed, 0, 0, shape))[None],
            output_type="np",
        ).images[0]
        ours = shares(sampler.images([prompt], [seed], guidance, SamplerSpec(name), STEPS))[0].transpose(1, 2, 0)
        assert np.abs(ours - theirs).max() <= 1 / 255, prompt
