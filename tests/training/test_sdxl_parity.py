"""An exported SDXL folder behind the server's engine against diffusers' own pipeline: the same noise, to 1/255."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from safelight_server.export.exporter import export, round_weights, text_encoder_of, token_ids
from safelight_server.export.options import ExportOptions
from safelight_server.sampler import gaussian, steps_left_out

from tests.training import folders
from tests.training.cells import EVERY
from tests.training.test_image_parity import STEPS, Served, off, picture_of, png

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
SAMPLERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}
SIZES = ((16, 24), (32, 16))
"""Of pictures; the first is that of the training."""
PROMPT, OTHER = "A red potion, wow! 8k!!", "blurry, ugly!"
SEEDS = [5, 6]


def exported(place: Path, pipeline: StableDiffusionXLPipeline) -> tuple[StableDiffusionXLPipeline, Served]:
    """The pipeline in torch, and its export behind the server's engine."""
    torch.set_num_threads(1)
    pipeline.save_pretrained(place / "folder")
    export(place / "folder", place / "models", ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        round_weights(getattr(pipeline, name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Served(place / "models")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusionXLPipeline, Served]:
    """SDXL's folder: an absent negative prompt has zeros in place of an embedding."""
    return exported(tmp_path_factory.mktemp("sdxl"), folders.sdxl_pipeline(latent=(12, 8)))


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets diffusers draw the noise of an output of ours."""

    def draw(seed: int, first_step: int, size: tuple[int, int]) -> None:
        shape, steps = (4, size[1] // 2, size[0] // 2), iter(range(first_step, STEPS))

        def drawn(stream: int) -> Any:
            return lambda *_, **__: torch.from_numpy(gaussian(seed, stream, next(steps) if stream == 1 else 0, shape))[
                None
            ]

        for module, stream in (
            ("pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", 0),
            ("pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img", 0),
            ("schedulers.scheduling_euler_ancestral_discrete", 1),
            ("schedulers.scheduling_lcm", 1),
            ("models.autoencoders.vae", 2),
        ):
            monkeypatch.setattr(f"diffusers.{module}.randn_tensor", drawn(stream))

    return draw


def test_the_manifest_is_that_of_sdxl(both: tuple[StableDiffusionXLPipeline, Served]) -> None:
    _, served = both
    manifest = served.pipeline.manifest
    assert manifest.family == "stable-diffusion-xl"
    assert manifest.inputs["text_embeds"] == "encoder:pooled_output"
    assert manifest.inputs["time_ids"] == "size_ids"
    assert (manifest.tokenizer.pad_id, manifest.second_tokenizer.pad_id) == (49407, 0)
    assert (manifest.latent.height, manifest.latent.width, manifest.latent.scaling_factor) == (12, 8, 0.13025)
    assert manifest.noise_schedule.steps_offset == 1
    assert manifest.noise_schedule.set_alpha_to_one is False
    assert manifest.defaults.guidance_scale == 5.0
    assert manifest.defaults.sampler.name == "euler"
    assert manifest.notes == ()
    assert [served.pipeline.size_ids((4, height // 2, width // 2)).tolist() for width, height in SIZES] == [
        [24, 16, 0, 0, 24, 16],
        [16, 32, 0, 0, 16, 32],
    ]


CELLS = list(itertools.product(SAMPLERS, (1.0, 5.0), SIZES))
CI_CELLS = [*CELLS[0::8], *CELLS[3::8], *CELLS[5::8], *CELLS[6::8]]


@pytest.mark.parametrize(("sampler", "guidance", "size"), CELLS if EVERY else CI_CELLS)
def test_a_generation_is_that_of_diffusers(both, noisy, sampler, guidance, size):
    pipeline, served = both
    for spacing, negative in (("leading", ""), ("trailing", OTHER)):
        pipeline.scheduler = SAMPLERS[sampler].from_config(folders.SDXL_SCHEDULER, timestep_spacing=spacing)
        ours = served.pictures(PROMPT, SEEDS, guidance, sampler, 1.0, negative=negative, spacing=spacing, size=size)
        for seed, picture in zip(SEEDS, ours, strict=True):
            assert off(picture, theirs(pipeline, noisy, seed, guidance, size, negative or None)) <= 1, negative


def theirs(pipeline, noisy, seed: int, guidance: float, size: tuple[int, int], negative: str | None):
    """The picture of diffusers' pipeline."""
    noisy(seed, 0, size)
    return pipeline(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        width=size[0],
        height=size[1],
    ).images[0]


def test_a_distilled_model_is_drawn_without_guidance_as_diffusers_does(both, noisy):
    """SDXL Turbo: diffusers' guidance scale of 0 is 1 here."""
    pipeline, served = both
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        folders.SDXL_SCHEDULER, timestep_spacing="trailing"
    )
    ours = served.pictures(PROMPT, SEEDS, 1.0, "euler_ancestral", 1.0, spacing="trailing", size=SIZES[0])
    for seed, picture in zip(SEEDS, ours, strict=True):
        assert off(picture, theirs(pipeline, noisy, seed, 0.0, SIZES[0], None)) <= 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_consistency_model_is_drawn_as_diffusers_does(both, noisy, guidance):
    pipeline, served = both
    pipeline.scheduler = LCMScheduler.from_config(folders.SDXL_SCHEDULER)
    ours = served.pictures(PROMPT, SEEDS, guidance, "lcm", 1.0, spacing="trailing", size=SIZES[1])
    for seed, picture in zip(SEEDS, ours, strict=True):
        assert off(picture, theirs(pipeline, noisy, seed, guidance, SIZES[1], None)) <= 1


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_an_empty_negative_prompt_is_what_the_folder_says(zeros):
    pipeline = folders.sdxl_pipeline(force_zeros_for_empty_prompt=zeros)
    hidden, pooled = text_encoder_of(pipeline)(token_ids(pipeline, [PROMPT, ""]))
    prompt, negative, pooled_prompt, pooled_negative = pipeline.encode_prompt(PROMPT)
    torch.testing.assert_close(hidden, torch.cat([prompt, negative]))
    torch.testing.assert_close(pooled, torch.cat([pooled_prompt, pooled_negative]))
    assert bool(negative.any()) is not zeros


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_development_from_a_picture_is_that_of_diffusers(both, noisy, sampler):
    pipeline, served = both
    made = StableDiffusionXLImg2ImgPipeline(**pipeline.components, add_watermarker=False)
    made.scheduler = SAMPLERS[sampler].from_config(folders.SDXL_SCHEDULER)
    made.set_progress_bar_config(disable=True)
    init = picture_of(served.size)
    [picture] = served.pictures(PROMPT, SEEDS[:1], 5.0, sampler, 0.7, png(init), spacing="leading")
    noisy(SEEDS[0], steps_left_out(STEPS, 0.7), served.size)
    reference = made(PROMPT, image=init, strength=0.7, num_inference_steps=STEPS, guidance_scale=5.0).images[0]
    assert off(picture, reference) <= 1


def test_two_prompts_of_one_word_more_differ(both):
    """The pooled output and both encoders reach the denoiser."""
    _, served = both
    one, other = (served.pictures(prompt, [5], 1.0, "euler", 1.0)[0] for prompt in ("a potion", "a red potion"))
    assert not np.array_equal(one, other)
