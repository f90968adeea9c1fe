"""Pictures as prompts (IP-Adapter) against diffusers' own pipelines: the same picture, noise and scale, to 1/255.

The server's side is the exporter, and its engine on ONNX Runtime from the picture's file to the finished pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from safelight_server.domain.uploads import decode_image_prompt
from safelight_server.export.exporter import export, round_weights
from safelight_server.export.options import ExportOptions
from safelight_server.export.source import ExportError
from safelight_server.sampler import gaussian
from transformers import CLIPImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.training import folders
from tests.training.cells import EVERY
from tests.training.test_image_parity import STEPS, Pixels, Served, off, picture_of, png

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
SIZES = ((16, 24), (32, 16))
"""Of pictures; the first is the default."""
PROMPT = "A red potion, wow! 8k!!"
PICTURE = picture_of((50, 37))
SEEDS = [5, 6]
KINDS = ["sd", "sd-plus", "sdxl", "adapters"] if EVERY else ["sd"]
"""Each takes most of a minute; CI has one."""


def exported(kind: str, place: Path) -> tuple[DiffusionPipeline, Served]:
    """A random pipeline with a random IP-Adapter, as diffusers loads it, and its export behind the server's engine.

    Of the kind "adapters" its denoiser has room for LoRA too.
    """
    torch.set_num_threads(1)
    is_sdxl = kind == "sdxl"
    pipeline = folders.sdxl_pipeline(latent=(12, 8)) if is_sdxl else folders.pipeline()
    pipeline.save_pretrained(place / "folder")
    given = folders.ip_adapter(pipeline.unet, place / "ip", is_plus=kind == "sd-plus")
    options = ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES, image_prompt=given)
    if kind == "adapters":
        options = ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES, image_prompt=given, adapter_rank=2)
    export(place / "folder", place / "models", options)
    pipeline.load_ip_adapter(str(given), subfolder="", weight_name=folders.IP_ADAPTER)
    networks = ["unet", "vae", "text_encoder", "image_encoder", *(["text_encoder_2"] if is_sdxl else [])]
    for name in networks:
        round_weights(getattr(pipeline, name))
    config = folders.SDXL_SCHEDULER if is_sdxl else pipeline.scheduler.config
    pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="leading")
    # That of torchvision, which is the default, rounds some bytes the other way.
    edge = pipeline.image_encoder.config.image_size
    pipeline.feature_extractor = CLIPImageProcessorPil(size=edge, crop_size=edge)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Served(place / "models")


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    return exported(request.param, tmp_path_factory.mktemp(request.param))


def ours(served: Served, guidance: float, size: tuple[int, int], scale: float) -> list[Pixels]:
    """The pictures of all seeds; a scale of 0 is no image prompt, as the server resolves it."""
    given = {"image_prompt": png(PICTURE), "image_prompt_scale": scale} if scale else {}
    return served.pictures(PROMPT, SEEDS, guidance, "euler", 1.0, spacing="leading", size=size, **given)


def theirs(pipeline: DiffusionPipeline, seed: int, guidance: float, size: tuple[int, int], scale: float):
    pipeline.set_ip_adapter_scale(scale)
    shape = (4, size[1] // 2, size[0] // 2)
    return pipeline(
        PROMPT,
        ip_adapter_image=PICTURE,
        latents=torch.from_numpy(gaussian(seed, 0, 0, shape))[None],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        width=size[0],
        height=size[1],
    ).images[0]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_picture_as_a_prompt_is_that_of_diffusers(both, guidance, size):
    pipeline, served = both
    drawn = {scale: ours(served, guidance, size, scale) for scale in (0.0, 0.5, 1.0)}
    for scale, pictures in drawn.items():
        for seed, picture in zip(SEEDS, pictures, strict=True):
            assert off(picture, theirs(pipeline, seed, guidance, size, scale)) <= 1, scale
    for scale in (0.5, 1.0):
        assert np.abs(drawn[scale][0].astype(int) - drawn[0.0][0].astype(int)).max() > 8, "the picture matters"


def test_rows_have_the_bits_that_they_have_alone(both):
    """Beside each other rows of other pictures, scales and none; and a scale of 0 is no picture, whatever the tokens."""
    _, served = both
    [file] = [file for role, file in served.pipeline.files.items() if role == "denoiser"]
    session = onnxruntime.InferenceSession(file)
    rng, rows = np.random.default_rng(3), 5
    feed = {
        at.name: rng.standard_normal(
            (rows, *[4 if isinstance(axis, str) else axis for axis in at.shape[1:]]), np.float32
        )
        for at in session.get_inputs()
    }
    feed["image_prompt_scale"] = np.array([0.0, 1.0, 0.5, 0.0, 2.0], np.float32)
    [together] = session.run(None, feed)
    for row in range(rows):
        [alone] = session.run(None, {name: array[row : row + 1] for name, array in feed.items()})
        assert np.array_equal(together[row], alone[0]), row
    feed["image_prompt_tokens"] = feed["image_prompt_tokens"][::-1].copy()
    [others] = session.run(None, feed)
    assert [np.array_equal(a, b) for a, b in zip(together, others, strict=True)] == [True, False, True, True, False]


def test_an_ip_adapter_of_another_unet_is_refused(tmp_path):
    pipeline = folders.pipeline()
    pipeline.save_pretrained(tmp_path / "folder")
    wider = folders.unet(layers_per_block=2)
    options = ExportOptions("tiny", licence="CC0-1.0", image_prompt=folders.ip_adapter(wider, tmp_path / "ip"))
    with pytest.raises(ExportError, match="it belongs to another base model"):
        export(tmp_path / "folder", tmp_path / "models", options)
    assert not list((tmp_path / "models").glob("pipelines/*"))


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (24, 24), (100, 31), (17, 90), (300, 200)])
def test_pixels_are_those_of_transformers(size):
    """Bit for bit with Pillow; torchvision rounds some bytes the other way."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))
    ours = decode_image_prompt(png(image), 1 << 24, 24).transpose(2, 0, 1).astype(int)
    mean, std = (np.array(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    for kind, most in ((CLIPImageProcessorPil, 0), (CLIPImageProcessor, 1)):
        made = np.asarray(kind(size=24, crop_size=24)(image, return_tensors="np").pixel_values[0])
        assert np.abs(np.round((made * std + mean) * 255) - ours).max() <= most, kind
