"""docs/models.md, adapters.md and controls.md, walked: each of their commands, from a folder to a picture; and that picture."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from safelight import Client
from safelight_server.app.server import serving
from safelight_server.export.exporter import round_weights
from safelight_server.sampler import gaussian
from safelight_server.settings import load

from load_tests.ports import free_port
from tests.support.adapters import matrices, safetensors, write_adapter
from tests.training import folders
from tests.training.checkpoints import save_checkpoint

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
PAGES = [(Path(__file__).parents[2] / "docs" / f"{name}.md").read_text() for name in ("models", "adapters", "controls")]
COMMANDS = [shlex.split(line) for page in PAGES for line in re.findall(r"^    (safelight .*)$", page, re.MULTILINE)]
ADAPTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SIZES = ((16, 16), (32, 16))
PROMPT, SEED, STEPS, GUIDANCE = "a red potion", 7, 4, 7.5


def safelight(folder: Path, *arguments: str) -> str:
    """Runs a command in `folder`; its output."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-m", "safelight_server", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder in which the page's exports were run, with two sizes, and what the last one said."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("models-page")
    pipeline = folders.pipeline()
    pipeline.save_pretrained(place / "my-model")
    folders.sdxl_pipeline().save_pretrained(place / "my-sdxl")
    folders.flux_pipeline(is_distilled=True).save_pretrained(place / "my-flux")
    folders.z_image_pipeline().save_pretrained(place / "my-z-image")
    folders.inpainting_pipeline(pipeline).save_pretrained(place / "my-inpainter")
    for seed, name in enumerate(("my-canny", "my-depth")):
        folders.control_network(pipeline.unet, seed).save_pretrained(place / name)
    folders.ip_adapter(pipeline.unet, place / "ip-adapter")
    save_checkpoint(pipeline, place / "my-model.safetensors")
    said = {}
    for _, verb, *arguments in COMMANDS:
        if verb == "export":
            sizes = ",".join(f"{w}x{h}" for w, h in SIZES)
            more = () if "--dry-run" in arguments else ("--sizes", sizes, "--format", "both")
            if more and "--adapter-rank" in arguments:  # the first export has that room too, as it takes minutes
                more = ("--dry-run",)
            elif more:
                more += ("--adapter-rank", "16")
            licence = () if "--licence" in arguments else ("--licence", "CC0-1.0")
            said[" ".join(arguments)] = safelight(place, verb, *arguments, *more, *licence)
    assert sum("--dry-run" in line for line in said) == 8
    first, planned = [text for line, text in said.items() if "--dry-run" not in line]
    assert "room for adapters of rank 16 in each row, in the layers blocks, and in the text encoders" in planned
    layer = pipeline.unet.get_submodule(ADAPTED)
    targets = [(ADAPTED, layer.in_features, layer.out_features)]
    write_adapter(place / "served" / "adapters", "pixel", arrays=matrices(4, 0, targets))
    (place / "served" / "adapters" / "ink.safetensors").write_bytes(safetensors(matrices(4, 1, targets, "unet.")))
    yield place, first


@pytest.fixture
async def address(walked: tuple[Path, str]) -> AsyncIterator[str]:
    async with serving(load(port=free_port(), models_dir=walked[0] / "served", num_instances=2)) as running:
        yield running.address


def test_an_export_shows_what_it_does(walked: tuple[Path, str]) -> None:
    said = walked[1]
    assert "note: scheduler PNDMScheduler is not served: euler is the default in its place" in said
    for step in ("reading the weights", "text_encoder (1 of 4)", "denoiser (2 of 4)", "decoder (3 of 4)"):
        assert step in said
    assert said.rstrip().endswith("wrote models/my-model 1 to served")


async def test_the_commands_for_the_server_work(walked: tuple[Path, str], address: str) -> None:
    place, _ = walked
    said = ""
    for _, verb, *arguments in COMMANDS:
        if verb in ("models", "generate") and "my-inpainter" not in arguments:  # judged, not exported
            said += await asyncio.to_thread(safelight, place, verb, *arguments, "--target", address)
    assert "models/my-model  1  on onnx  (default)" in said
    assert "    draws from text, from a picture (--init), in a part of a picture (--init, --mask)\n" in said
    assert "    sizes 16x16, 32x16\n" in said
    assert "    adapters ink (rank 4), pixel (rank 4); ranks of 16 together in a request (--adapter)\n" in said
    assert "note: scheduler PNDMScheduler is not served" in said
    plain, adapted = (np.asarray(Image.open(place / f"{name}.png"), int) for name in ("potion", "pixel"))
    assert plain.shape[:2] == adapted.shape[:2] == SIZES[0]
    assert np.abs(plain - adapted).max() > 1, "the adapter has an effect"


@pytest.mark.parametrize("size", SIZES, ids=str)
async def test_pictures_of_each_size_are_those_of_diffusers(
    walked: tuple[Path, str], address: str, size: tuple[int, int]
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(walked[0] / "my-model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        round_weights(network)
    width, height = size
    noise = torch.from_numpy(gaussian(SEED, 0, 0, (4, height // 2, width // 2)))[None]
    theirs = pipeline(
        PROMPT, height=height, width=width, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise
    ).images[0]
    async with Client(address) as client:
        ours = await client.generate(PROMPT, seed=SEED, width=width, height=height, steps=STEPS).image()
    assert ours.size == theirs.size == size
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


async def test_the_torch_runtime_draws_the_pictures_of_onnx_runtime(walked: tuple[Path, str], address: str) -> None:
    async def pictures(at: str) -> tuple[list[np.ndarray], str]:
        async with Client(at) as client:
            asked = [client.generate(PROMPT, seed=SEED, width=w, height=h, steps=STEPS) for w, h in SIZES]
            images = [np.asarray(await one.image(), int) for one in asked]
            return images, (await client.models())[0].numerics_id

    ours, name = await pictures(address)
    settings = load(port=free_port(), models_dir=walked[0] / "served", runtime="torch", num_instances=1)
    async with serving(settings) as running:
        theirs, other = await pictures(running.address)
    for one, two in zip(ours, theirs, strict=True):
        assert np.abs(one - two).max() <= 1
    assert name != other
