"""SDXL behind the server's engine against diffusers' own pipeline: two text encoders, a pooled one, size ids."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safelight_server.catalog.digest import sha256
from safelight_server.export.components import DenoiserXL, Encoder, TextEncoders, decoder_of
from safelight_server.export.onnx_file import write_onnx
from safelight_server.export.repository import write_config
from safelight_server.sampler import gaussian, steps_left_out
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.training.test_image_parity import STEPS, Served, off, picture_of, png
from tests.training.test_pipeline_parity import half, prompts
from training import networks
from training.recipe import RECIPE

SAMPLERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SHAPE = (4, 12, 8)
POOLED, TIME = 24, 8


def build() -> StableDiffusionXLPipeline:
    """A random pipeline of SDXL's classes, small, for pictures that are no squares."""
    networks.seed_everything(0)
    tokens = networks.tokenizer(RECIPE, prompts(200))
    other = copy.deepcopy(tokens)
    other.pad_token = "!"

    def text(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=POOLED,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=RECIPE.max_tokens,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )

    unet = UNet2DConditionModel(
        sample_size=SHAPE[1:],
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(4, 8),
        cross_attention_dim=32 + 40,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )
    return StableDiffusionXLPipeline(
        vae=half(vae),
        text_encoder=half(CLIPTextModel(text(32))),
        text_encoder_2=half(CLIPTextModelWithProjection(text(40))),
        tokenizer=tokens,
        tokenizer_2=other,
        unet=half(unet),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    )


@torch.no_grad()
def write(pipeline: StableDiffusionXLPipeline, models: Path) -> None:
    """The pipeline as a folder of models."""
    tokens, second = pipeline.tokenizer, pipeline.tokenizer_2
    text = TextEncoders(pipeline.text_encoder, pipeline.text_encoder_2, tokens.eos_token_id, second.pad_token_id, True)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, *SHAPE, generator=generator)
    ids = torch.randint(2, len(tokens), (2, RECIPE.max_tokens), generator=generator)
    hidden, pooled = text.eval()(ids)
    size = {"height_px": 2 * SHAPE[1], "width_px": 2 * SHAPE[2]}
    components = {
        "text_encoder": (text, {"input_ids": ids}),
        "denoiser": (
            DenoiserXL(pipeline.unet),
            {
                "sample": latent,
                "timestep": torch.tensor([999.0, 12.0]),
                "encoder_hidden_states": hidden,
                "text_embeds": pooled,
                "time_ids": torch.tensor([[24.0, 16, 0, 0, 24, 16]] * 2),
            },
        ),
        "decoder": (decoder_of(pipeline.vae), {"latent": latent}),
        "encoder": (Encoder(pipeline.vae), {"image": torch.rand(2, 3, size["height_px"], size["width_px"])}),
    }
    bound = {}
    for role, (module, inputs) in components.items():
        place = models / "repository" / f"tiny_{role}"
        write_onnx(module.eval(), [inputs], module.outputs, place / "1" / "model.onnx")
        write_config(place / "config.pbtxt", place.name, 8, [inputs], module)
        bound[role] = {"model": place.name, "version": 1, "sha256": sha256(place / "1" / "model.onnx")}
    folder = models / "pipelines" / "tiny" / "1"
    folder.mkdir(parents=True)
    tokens._tokenizer.save(str(folder / "tokenizer.json"))
    spacings = ["leading", "trailing", "linspace"]
    whole = {
        "format": 1,
        "name": "tiny",
        "revision": "1",
        "description": "random weights",
        "license": "Apache-2.0",
        "family": "stable-diffusion-xl",
        "components": bound,
        "inputs": {
            "sample": "latent",
            "timestep": "timestep",
            "encoder_hidden_states": "encoder:last_hidden_state",
            "text_embeds": "encoder:pooled_output",
            "time_ids": "size_ids",
        },
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": sha256(folder / "tokenizer.json"),
            "max_tokens": RECIPE.max_tokens,
            "pad_id": tokens.pad_token_id,
            "bos_id": tokens.bos_token_id,
            "eos_id": tokens.eos_token_id,
        },
        "latent": {"channels": SHAPE[0], "height": SHAPE[1], "width": SHAPE[2], "scaling_factor": 0.13025},
        "sizes": [size],
        "prediction_type": "epsilon",
        "noise_schedule": SCHEDULE,
        "samplers": [{"name": name, "spacings": spacings, "sigma_schedules": ["default"]} for name in SAMPLERS],
        "defaults": {
            "num_inference_steps": 10,
            "guidance_scale": 5.0,
            "sampler": {"name": "euler", "spacing": "leading"},
        },
        "limits": {"max_num_inference_steps": 50, "max_guidance_scale": 20.0, "max_outputs": 8},
        "linear_preview": {"block": 1, "weights": [[0.2] * 3] * 4, "bias": [0.0] * 3},
    }
    (folder / "pipeline.json").write_text(json.dumps(whole))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The pipeline in torch, and the same served."""
    torch.set_num_threads(1)
    models, pipeline = tmp_path_factory.mktemp("sdxl"), build()
    write(pipeline, models)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Served(models)


def noisy(monkeypatch, seed: int, first_step: int) -> None:
    """Lets diffusers draw the noise of an output of ours."""
    steps = iter(range(first_step, STEPS))

    def drawn(stream: int):
        return lambda *_, **__: torch.from_numpy(gaussian(seed, stream, next(steps) if stream == 1 else 0, SHAPE))[None]

    for module, stream in (
        ("pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", 0),
        ("pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img", 0),
        ("schedulers.scheduling_euler_ancestral_discrete", 1),
        ("models.autoencoders.vae", 2),
    ):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", drawn(stream))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_generation_is_that_of_diffusers(both, monkeypatch, sampler, spacing, guidance):
    pipeline, served = both
    pipeline.scheduler = SAMPLERS[sampler](**SCHEDULE, timestep_spacing=spacing, **_more(sampler))
    asked, seeds = prompts(3), [5, 6]
    for prompt, negative in zip(asked, ("", "", asked[0]), strict=True):
        if negative and guidance == 1.0:
            continue
        ours = served.pictures(prompt, seeds, guidance, sampler, 1.0, negative=negative, spacing=spacing)
        for seed, picture in zip(seeds, ours, strict=True):
            noisy(monkeypatch, seed, 0)
            reference = pipeline(
                prompt,
                negative_prompt=negative or None,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                width=2 * SHAPE[2],
                height=2 * SHAPE[1],
            ).images[0]
            assert off(picture, reference) <= 1, (prompt, negative, seed)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_development_from_a_picture_is_that_of_diffusers(both, monkeypatch, sampler):
    pipeline, served = both
    made = StableDiffusionXLImg2ImgPipeline(**pipeline.components, add_watermarker=False)
    made.scheduler = SAMPLERS[sampler](**SCHEDULE, timestep_spacing="leading", **_more(sampler))
    made.set_progress_bar_config(disable=True)
    prompt, init = prompts(1)[0], picture_of(served.size)
    [picture] = served.pictures(prompt, [5], 5.0, sampler, 0.7, png(init), spacing="leading")
    noisy(monkeypatch, 5, steps_left_out(STEPS, 0.7))
    reference = made(prompt, image=init, strength=0.7, num_inference_steps=STEPS, guidance_scale=5.0).images[0]
    assert off(picture, reference) <= 1


def test_two_prompts_of_one_word_more_differ(both):
    """The pooled output and both encoders reach the denoiser."""
    _, served = both
    one, other = (served.pictures(prompt, [5], 1.0, "euler", 1.0)[0] for prompt in prompts(2))
    assert not np.array_equal(one, other)


def _more(sampler: str) -> dict[str, object]:
    return {"clip_sample": False, "set_alpha_to_one": True} if sampler == "ddim" else {}
