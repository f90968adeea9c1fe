"""Whole generations against diffusers' StableDiffusionPipeline: same weights, same noise, to 1/255 before rounding."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safelight_server.export.exporter import export
from safelight_server.export.options import ExportOptions
from safelight_server.sampler import SamplerSpec, gaussian

from tests.training.cells import EVERY
from training import networks
from training.icons import caption, sample_spec
from training.recipe import RECIPE
from training.sample import Sampler, shares

STEPS = 8
CONTRAST = 16.0
"""With it a random decoder of `icons` uses most of the range from black to white, and clips nothing."""
ATTENTION = 8.0
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


def show(unet: UNet2DConditionModel, decoder: AutoencoderTiny) -> None:
    """Lets random networks draw pictures with content, which depends on the prompt.

    The decoder's layers give about 0, and 0 is black; the prompt moves what random cross-attention gives by little.
    """
    last = decoder.decoder.layers[-1]
    last.weight.data *= CONTRAST
    last.bias.data.fill_(0.5)
    for name, attention in unet.named_modules():
        if name.endswith("attn2"):
            attention.to_out[0].weight.data *= ATTENTION


def build(kind: str) -> StableDiffusionPipeline:
    """A random pipeline of the classes of `icons`, or of Stable Diffusion 1.5, small."""
    networks.seed_everything(0)
    tokens = networks.tokenizer(RECIPE, prompts(200))
    text, unet = networks.text_encoder(RECIPE, tokens), networks.denoiser(RECIPE)
    vae: AutoencoderTiny | AutoencoderKL = networks.autoencoder(RECIPE, 8, (1, 1, 1, 1, 0))
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
    else:
        show(unet, vae)
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


@functools.cache
def exported(kind: str) -> tuple[StableDiffusionPipeline, Path]:
    """What `build` makes, and the models folder that it is exported into: once for all tests of this process.

    Its scheduler may be replaced; nothing else of it may be changed.
    """
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix=kind))  # it goes with all others when the tests end, see tests/conftest.py
    pipeline = build(kind)
    pipeline.save_pretrained(folder / "pipeline")
    export(folder / "pipeline", folder / "models", ExportOptions("tiny", licence="CC0-1.0"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder / "models"


@pytest.fixture(scope="module", params=["icons", "sd15"])
def both(request):
    """The pipeline in torch, and the same exported."""
    pipeline, models = exported(request.param)
    return pipeline, Sampler(models / "pipelines" / "tiny" / "1" / "pipeline.json")


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
    for seed, prompt in enumerate(prompts(8 if EVERY else 3)):
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
