"""Development from a picture, of a part of it, and by kinds of guidance, against diffusers' own pipelines, to 1/255.

The server's side is its engine on ONNX Runtime, from the picture's file to the finished pixels.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safelight_server.catalog import catalog
from safelight_server.domain.errors import SafelightError
from safelight_server.domain.uploads import decode_image_prompt, decode_mask, decode_picture
from safelight_server.engine.engine import Engine
from safelight_server.engine.jobs import ImagePrompt, InitImage, Job
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.runtime.onnx import OnnxRuntime
from safelight_server.sampler import SamplerSpec, compile_table, gaussian, steps_left_out
from safelight_server.sampler import guided_steps as steps_of_interval
from safelight_server.scheduler import Priority
from safelight_server.telemetry import Metrics

from tests.training.cells import EVERY
from tests.training.test_pipeline_parity import exported, prompts
from training import networks

STEPS = 10
SAMPLERS = {
    "ddim": None,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}
Pixels = npt.NDArray[np.uint8]


class Picture(ExecutionObserver):
    """Waits for the end of an output."""

    def __init__(self) -> None:
        self.image: asyncio.Future[npt.NDArray[np.float32]] = asyncio.get_running_loop().create_future()

    def decoded(self, image: npt.NDArray[np.float32]) -> None:
        self.image.set_result(image)

    def failed(self, error: SafelightError) -> None:
        self.image.set_exception(error)


class Served:
    """An exported pipeline behind the server's engine."""

    def __init__(self, models: Path) -> None:
        self.catalog = catalog.load(models)
        self.pipeline = self.catalog.get("tiny")
        self.runtime = OnnxRuntime(self.catalog, 1)
        asyncio.run(self.runtime.start())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.pipeline.latent_shape(*self.size)

    @property
    def size(self) -> tuple[int, int]:
        size = self.pipeline.manifest.sizes[0]
        return size.width_px, size.height_px

    def pictures(
        self,
        prompt: str,
        seeds: list[int],
        guidance: float,
        sampler: str,
        strength: float,
        init: bytes = b"",
        mask: bytes = b"",
        negative: str = "",
        spacing: str = "trailing",
        guided_steps: range | None = None,
        guidance_rescale: float = 0.0,
        size: tuple[int, int] | None = None,
        num_steps: int = STEPS,
        image_prompt: bytes = b"",
        image_prompt_scale: float = 1.0,
    ) -> list[Pixels]:
        """The finished pictures of all seeds, which share batches."""
        spec, manifest = SamplerSpec(sampler, spacing), self.pipeline.manifest
        size = size or self.size
        first = steps_left_out(num_steps, strength)
        schedule = self.pipeline.schedule.at(*self.pipeline.latent_shape(*size)[1:])
        table = compile_table(spec, schedule, manifest.prediction_type, num_steps, first)
        is_guided = guidance != 1 and not manifest.is_guidance_distilled
        tokens = tuple(self.pipeline.tokenizer.encode(text).ids for text in (prompt, negative)[: 1 + is_guided])
        whole = 1 << 24
        image = None
        if init:
            painted = decode_mask(mask, whole, *size) if mask else None
            image = InitImage("init", decode_picture(init, whole, *size), painted)
        prompt_of_image = None
        if image_prompt:
            pixels = decode_image_prompt(image_prompt, whole, manifest.image_prompt.edge_px)
            prompt_of_image = ImagePrompt("prompt", pixels, image_prompt_scale)
        jobs = [
            Job(
                number,
                "a/b",
                Priority.STANDARD,
                self.pipeline,
                self.pipeline.latent_shape(*size),
                table,
                seed,
                guidance,
                tokens,
                image=image,
                guided_steps=guided_steps,
                guidance_rescale=guidance_rescale,
                image_prompt=prompt_of_image,
            )
            for number, seed in enumerate(seeds)
        ]

        async def develop() -> list[Pixels]:
            engine = Engine(self.runtime, time.monotonic, Metrics(), max_running=8)
            observers = [Picture() for _ in jobs]
            for job, observer in zip(jobs, observers, strict=True):
                engine.submit(job, observer)
            images = [await observer.image for observer in observers]
            await engine.close()
            return [job.finish(image) for job, image in zip(jobs, images, strict=True)]

        return asyncio.run(develop())


@pytest.fixture(scope="module", params=["icons", "sd15"])
def both(request):
    """The components in torch, and the same served."""
    pipeline, models = exported(request.param)
    served = Served(models)
    [picture] = served.pictures(prompts(1)[0], [5], 1.0, "ddim", 1.0)
    assert np.ptp(picture) > 64 and len(np.unique(picture)) > 32, "pictures that are flat would compare nothing"
    return pipeline, served


@pytest.fixture
def theirs(both, monkeypatch):
    """Makes diffusers' pipeline of a class with a sampler, drawing the noise of an output of ours."""
    pipeline, served = both

    def make(kind: type, sampler: str, seed: int, strength: float, **more: object):
        config = networks.noise_schedule().config
        scheduler = networks.noise_schedule() if SAMPLERS[sampler] is None else SAMPLERS[sampler].from_config(config)
        made = kind(**pipeline.components | {"scheduler": scheduler}, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        shape = served.latent_shape
        steps = iter(range(steps_left_out(STEPS, strength), STEPS))

        def drawn(stream: int):
            def noise(*_args: object, **_kwargs: object) -> torch.Tensor:
                step = next(steps) if stream == 1 else 0
                return torch.from_numpy(gaussian(seed, stream, step, shape))[None]

            return noise

        for module, stream in (
            ("pipelines.stable_diffusion.pipeline_stable_diffusion_img2img", 0),
            ("pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint", 0),
            ("schedulers.scheduling_euler_ancestral_discrete", 1),
            ("schedulers.scheduling_lcm", 1),
            ("models.autoencoders.vae", 2),
        ):
            monkeypatch.setattr(f"diffusers.{module}.randn_tensor", drawn(stream))
        return made

    return make


def picture_of(size: tuple[int, int]) -> Image.Image:
    """A picture with edges and colours."""
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([across, down, 255 - across], axis=2).astype(np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (250, 240, 20)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def off(ours: Pixels, reference: Image.Image) -> int:
    """The largest difference of two pictures, in 255ths."""
    return int(np.abs(ours.astype(int) - np.asarray(reference).astype(int)).max())


STARTS = list(itertools.product(SAMPLERS, (0.1, 0.7, 1.0)))
CI_STARTS = [
    *itertools.product(SAMPLERS, (0.7,)),
    ("ddim", 0.1),
    ("euler_ancestral", 0.1),
    ("euler", 1.0),
    ("lcm", 1.0),
]


@pytest.mark.parametrize(("sampler", "strength"), STARTS if EVERY else CI_STARTS)
def test_development_from_a_picture_is_that_of_diffusers(both, theirs, sampler, strength):
    _, served = both
    prompt, init = prompts(1)[0], picture_of(served.size)
    seeds, guidance = [3, 4], 1.0 if sampler == "lcm" else 3.0
    ours = served.pictures(prompt, seeds, guidance, sampler, strength, png(init), b"")
    for seed, picture in zip(seeds, ours, strict=True):
        pipeline = theirs(StableDiffusionImg2ImgPipeline, sampler, seed, strength)
        reference = pipeline(
            prompt, init, strength=strength, num_inference_steps=STEPS, guidance_scale=guidance
        ).images[0]
        assert off(picture, reference) <= 1, seed


PARTS = list(itertools.product(SAMPLERS, (0.6, 1.0), (False, True)))
CI_PARTS = [*PARTS[0::4], *PARTS[3::4]]


@pytest.mark.parametrize(("sampler", "strength", "soft"), PARTS if EVERY else CI_PARTS)
def test_a_part_developed_anew_is_that_of_diffusers(both, theirs, sampler, strength, soft):
    torch_pipeline, served = both
    if torch_pipeline.unet.config.in_channels != 4:
        pytest.skip("diffusers inpaints with UNets of 4 channels alone")
    prompt, init = prompts(1)[0], picture_of(served.size)
    _, height, width = served.latent_shape
    shares = np.zeros((height, width), np.uint8)
    shares[height // 4 :, : width // 2] = 255
    if soft:
        shares[height // 2] = 102
    mask = Image.fromarray(shares).resize(served.size, Image.Resampling.NEAREST)
    guidance = 1.0 if sampler == "lcm" else 3.0
    [picture] = served.pictures(prompt, [5], guidance, sampler, strength, png(init), png(mask))
    pipeline = theirs(StableDiffusionInpaintPipeline, sampler, 5, strength)
    if soft:
        pipeline.mask_processor = VaeImageProcessor(
            vae_scale_factor=pipeline.vae_scale_factor, do_normalize=False, do_convert_grayscale=True
        )
    reference = pipeline(
        prompt,
        init,
        mask,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=served.size[1],
        width=served.size[0],
    ).images[0]
    share = np.asarray(mask).astype(float)[..., None] / 255
    whole = share * np.asarray(reference) + (1 - share) * np.asarray(init)  # as the pipeline's apply_overlay
    assert off(picture, Image.fromarray(np.round(whole).astype(np.uint8))) <= 1
    kept = np.asarray(mask) == 0
    assert np.array_equal(picture[kept], np.asarray(init)[kept])


SCALE, NEGATIVE = 7.5, "a blue gem"


def guided_reference(pipeline: StableDiffusionPipeline, seed: int, guided: range, rescale: float) -> Image.Image:
    """Diffusers' picture with guidance in some steps alone: a callback turns it on and off between the steps."""
    prompt, shape = prompts(1)[0], (pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt(prompt, "cpu", 1, True, NEGATIVE)

    def switch(running: StableDiffusionPipeline, step: int, *_: object) -> dict[str, torch.Tensor]:
        on = step + 1 in guided
        running._guidance_scale = SCALE if on else 1.0
        return {"prompt_embeds": torch.cat([negative, positive]) if on else positive}

    return pipeline(
        prompt,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE if 0 in guided else 1.0,
        guidance_rescale=rescale,
        latents=torch.from_numpy(gaussian(seed, 0, 0, shape))[None],
        callback_on_step_end=switch,
    ).images[0]


KINDS = [((0, 1), 0.7), ((0, 1), 1.0), ((0.2, 0.8), 0.0), ((0, 0.5), 0.0), ((0.5, 1), 0.7)]
GUIDED = [(sampler, *kind) for kind in KINDS for sampler in ("ddim", "dpmpp_2m")]
CI_GUIDED = [*GUIDED[0::4], *GUIDED[3::4]]


@pytest.mark.parametrize(("sampler", "interval", "rescale"), GUIDED if EVERY else CI_GUIDED)
def test_kinds_of_guidance_are_those_of_diffusers(both, theirs, sampler, interval, rescale):
    _, served = both
    guided = steps_of_interval(STEPS, *interval)
    [ours] = served.pictures(
        prompts(1)[0], [5], SCALE, sampler, 1.0, negative=NEGATIVE, guided_steps=guided, guidance_rescale=rescale
    )
    pipeline = theirs(StableDiffusionPipeline, sampler, 5, 1.0)
    assert off(ours, guided_reference(pipeline, 5, guided, rescale)) <= 1
    assert off(ours, guided_reference(pipeline, 5, range(STEPS), 0.0)) > 1, "the reference can tell"


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (0.29, 0.58), (0.7, 1.0), (0.05, 0.06)])
def test_the_steps_of_an_interval_are_those_of_diffusers_guiders(interval):
    guider = ClassifierFreeGuidance(start=interval[0], stop=interval[1])
    for num_steps in (1, 3, 10, 50, 100):
        theirs = []
        for step in range(num_steps):
            guider.set_state(step, num_steps, torch.tensor(0))
            theirs += [step] if guider._is_cfg_enabled() else []
        assert list(steps_of_interval(num_steps, *interval)) == theirs
