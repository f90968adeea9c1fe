"""Guidance rescale and guidance in an interval of the steps, against diffusers' pipeline: same noise, to 1/255.

The server's side is its engine on ONNX Runtime. Diffusers' side is StableDiffusionPipeline with `guidance_rescale`, and
with a callback that turns guidance on and off between the steps; which steps those are is asked of diffusers' guiders.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from safelight_server.export.exporter import export
from safelight_server.export.plan import ExportOptions
from safelight_server.sampler import gaussian, guided_steps

from tests.training.test_image_parity import STEPS, Served, off
from tests.training.test_pipeline_parity import build, prompts
from training import networks

SCALE, SEEDS, NEGATIVE = 7.5, [3, 4], "a blue gem"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The components in torch, and the same served."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("guidance")
    pipeline = build("icons")
    pipeline.save_pretrained(folder / "pipeline")
    export(folder / "pipeline", folder / "models", ExportOptions("tiny", licence="CC0-1.0"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Served(folder / "models")


def reference(
    pipeline: StableDiffusionPipeline, served: Served, seed: int, guided: range, rescale: float
) -> Image.Image:
    """Diffusers' picture with guidance in some steps alone."""
    prompt = prompts(1)[0]
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt(prompt, "cpu", 1, True, NEGATIVE)

    def embeddings(step: int) -> torch.Tensor:
        return torch.cat([negative, positive]) if step in guided else positive

    def switch(
        running: StableDiffusionPipeline, step: int, _timestep: object, _given: object
    ) -> dict[str, torch.Tensor]:
        running._guidance_scale = SCALE if step + 1 in guided else 1.0
        return {"prompt_embeds": embeddings(step + 1)}

    return pipeline(
        prompt,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE if 0 in guided else 1.0,
        guidance_rescale=rescale,
        latents=torch.from_numpy(gaussian(seed, 0, 0, served.latent_shape))[None],
        callback_on_step_end=switch,
    ).images[0]


@pytest.mark.parametrize(
    ("interval", "rescale"), [((0, 1), 0.7), ((0, 1), 1.0), ((0.2, 0.8), 0.0), ((0, 0.5), 0.0), ((0.5, 1), 0.7)]
)
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_guidance_is_that_of_diffusers(both, sampler, interval, rescale):
    pipeline, served = both
    config = networks.noise_schedule().config
    guided = guided_steps(STEPS, *interval)
    ours = served.pictures(
        prompts(1)[0], SEEDS, SCALE, sampler, 1.0, negative=NEGATIVE, guided_steps=guided, guidance_rescale=rescale
    )
    for seed, picture in zip(SEEDS, ours, strict=True):
        scheduler = networks.noise_schedule() if sampler == "ddim" else DPMSolverMultistepScheduler.from_config(config)
        pipeline.scheduler = scheduler
        assert off(picture, reference(pipeline, served, seed, guided, rescale)) <= 1, seed
        if (guided, rescale) != (range(STEPS), 0.0):
            assert off(picture, reference(pipeline, served, seed, range(STEPS), 0.0)) > 1, "it makes a difference"


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (0.29, 0.58), (0.7, 1.0), (0.05, 0.06)])
@pytest.mark.parametrize("num_steps", [1, 3, 10, 50, 100])
def test_the_steps_of_an_interval_are_those_of_diffusers_guiders(interval, num_steps):
    guider = ClassifierFreeGuidance(start=interval[0], stop=interval[1])
    theirs = []
    for step in range(num_steps):
        guider.set_state(step, num_steps, torch.tensor(0))
        theirs += [step] if guider._is_cfg_enabled() else []
    assert list(guided_steps(num_steps, *interval)) == theirs
