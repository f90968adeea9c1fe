"""Control networks beside a denoiser, exported and behind the server's engine, against diffusers' own pipelines.

Small random networks of Stable Diffusion 1.5's kind and of SDXL's. Pictures agree to 1/255.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from safelight import Client, Control, Finished
from safelight_server.app.server import serving
from safelight_server.catalog.catalog import Pipeline
from safelight_server.domain.component import Component
from safelight_server.domain.uploads import decode_picture
from safelight_server.engine.engine import Engine
from safelight_server.engine.jobs import Job
from safelight_server.engine.latents import RowControl
from safelight_server.export.exporter import export, round_weights
from safelight_server.export.plan import ExportOptions
from safelight_server.runtime import onnx, verification
from safelight_server.sampler import SamplerSpec, compile_table, controlled_steps, gaussian
from safelight_server.scheduler import Priority
from safelight_server.settings import load
from safelight_server.telemetry import Metrics

from load_tests.ports import free_port
from tests.training import folders
from tests.training.test_image_parity import Picture, Pixels, Served, off, picture_of, png
from tests.training.test_models_page import safelight

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
STEPS, SEEDS, PROMPT, NEGATIVE = 6, [5, 6], "a red potion", "blurry"
NAMES = ("edges", "depth")
SIZES = ((16, 24), (32, 16))
"""Of pictures; the first is that of the training."""
Wish = tuple[str, float, float, float]
"""A control network by name, with scale, start and end."""


class ControlledFolder:
    """A pipeline in torch with two control networks, and its export behind the server's engine."""

    def __init__(self, place: Path, pipeline: Any, kind: type) -> None:
        torch.set_num_threads(1)
        pipeline.save_pretrained(place / "folder")
        self.place = place
        self.networks = {name: folders.control_network(pipeline.unet, seed) for seed, name in enumerate(NAMES)}
        for name, network in self.networks.items():
            network.save_pretrained(place / name)
        controls = tuple((name, place / name) for name in self.networks)
        options = ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES, controls=controls)
        export(place / "folder", place / "models", options)
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        for network in (*(getattr(pipeline, name, None) for name in parts), *self.networks.values()):
            if network is not None:
                round_weights(network)
        self.torch, self.kind = pipeline, kind
        self.served = Served(place / "models")

    def theirs(
        self, wishes: list[Wish], seed: int, guidance: float, size: tuple[int, int], sampler: str
    ) -> Image.Image:
        """The picture of diffusers' pipeline."""
        scheduler = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[sampler].from_config(
            self.torch.scheduler.config, timestep_spacing="leading"
        )
        more = {"add_watermarker": False} if "XL" in self.kind.__name__ else {"requires_safety_checker": False}
        parts = {name: part for name, part in self.torch.components.items() if name != "scheduler"}
        names, scales, starts, ends = (
            given[0] if len(wishes) == 1 else list(given) for given in zip(*wishes, strict=True)
        )
        several = len(wishes) > 1
        networks = [self.networks[name] for name in names] if several else self.networks[names]
        made = self.kind(**parts, scheduler=scheduler, controlnet=networks, **more)
        made.set_progress_bar_config(disable=True)
        latents = torch.from_numpy(gaussian(seed, 0, 0, (4, size[1] // 2, size[0] // 2)))[None]
        return made(
            PROMPT,
            negative_prompt=NEGATIVE if guidance != 1 else None,
            image=[painting(name, size) for name in names] if several else painting(names, size),
            controlnet_conditioning_scale=scales,
            control_guidance_start=starts,
            control_guidance_end=ends,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            width=size[0],
            height=size[1],
            latents=latents,
        ).images[0]

    def ours(
        self, wishes: list[list[Wish]], seeds: list[int], guidance: float, size: tuple[int, int], sampler: str
    ) -> list[Pixels]:
        """The finished pictures of outputs with these controls each, which share batches."""
        pipeline = self.served.pipeline
        jobs = [
            job(pipeline, number, given, seed, guidance, size, sampler)
            for number, (given, seed) in enumerate(zip(wishes, seeds, strict=True))
        ]

        async def develop() -> list[Pixels]:
            engine = Engine(self.served.runtime, time.monotonic, Metrics(), max_running=8)
            observers = [Picture() for _ in jobs]
            for one, observer in zip(jobs, observers, strict=True):
                engine.submit(one, observer)
            images = [await observer.image for observer in observers]
            await engine.close()
            return [one.finish(image) for one, image in zip(jobs, images, strict=True)]

        return asyncio.run(develop())


def job(
    pipeline: Pipeline, number: int, wishes: list[Wish], seed: int, guidance: float, size: tuple[int, int], sampler: str
) -> Job:
    """One output with its controls."""
    shape = pipeline.latent_shape(*size)
    table = compile_table(SamplerSpec(sampler, "leading"), pipeline.schedule, "epsilon", STEPS)
    texts = (PROMPT, NEGATIVE)[: 1 + (guidance != 1)]
    controls = [
        RowControl(
            pipeline.manifest.controls.index(name),
            decode_picture(png(painting(name, size)), 1 << 20, *size),
            scale,
            controlled_steps(STEPS, start, end),
        )
        for name, scale, start, end in wishes
    ]
    tokens = tuple(pipeline.tokenizer.encode(text).ids for text in texts)
    return Job(
        number, "a/b", Priority.STANDARD, pipeline, shape, table, seed, guidance, tokens, controls=tuple(controls)
    )


def painting(name: str, size: tuple[int, int]) -> Image.Image:
    """The picture for a control network."""
    image = picture_of(size)
    return image if name == "edges" else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ControlledFolder:
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "sdxl":
        return ControlledFolder(place, folders.sdxl_pipeline(latent=(12, 8)), StableDiffusionXLControlNetPipeline)
    unet = folders.unet(sample_size=(12, 8))
    return ControlledFolder(place, folders.pipeline(unet=unet), StableDiffusionControlNetPipeline)


WISHES: list[list[Wish]] = [
    [("edges", 1.0, 0.0, 1.0)],
    [("edges", 0.7, 0.2, 0.8)],
    [("depth", 1.5, 0.0, 0.5)],
    [("edges", 0.6, 0.0, 1.0), ("depth", 0.9, 0.34, 1.0)],
]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_generation_is_that_of_diffusers(
    both: ControlledFolder, sampler: str, guidance: float, size: tuple[int, int]
) -> None:
    seeds = list(range(5, 5 + len(WISHES)))
    ours = both.ours(WISHES, seeds, guidance, size, sampler)
    for wishes, seed, picture in zip(WISHES, seeds, ours, strict=True):
        assert off(picture, both.theirs(wishes, seed, guidance, size, sampler)) <= 1, wishes
        [plain] = both.ours([[]], [seed], guidance, size, sampler)
        assert np.abs(picture.astype(int) - plain).max() > 8, "the controls matter"


def test_outputs_with_and_without_controls_share_batches_and_are_as_alone(both: ControlledFolder) -> None:
    wishes = [[], *WISHES, []]
    seeds = list(range(len(wishes)))
    together = both.ours(wishes, seeds, 5.0, SIZES[0], "ddim")
    for given, seed, picture in zip(wishes, seeds, together, strict=True):
        [alone] = both.ours([given], [seed], 5.0, SIZES[0], "ddim")
        assert np.array_equal(picture, alone), given


@pytest.mark.parametrize("num_steps", [1, 3, 6, 10, 25, 50])
def test_the_steps_of_a_control_are_those_of_diffusers(num_steps: int) -> None:
    for start, end in ((0.0, 1.0), (0.2, 0.8), (0.29, 0.58), (0.7, 1.0), (0.05, 0.06), (0.1, 0.3)):
        keeps = [1.0 - float(i / num_steps < start or (i + 1) / num_steps > end) for i in range(num_steps)]
        assert list(controlled_steps(num_steps, start, end)) == [i for i, keep in enumerate(keeps) if keep]


def test_a_network_is_not_run_where_no_row_uses_it(both: ControlledFolder) -> None:
    """Its nodes are in the profile of a call with a row that uses it, and in no other."""
    pipeline, rows = both.served.pipeline, 4
    assert pipeline.manifest.controls == ("edges", "depth")
    file = pipeline.files[Component.DENOISER]
    specs = onnx._inputs(onnxruntime.InferenceSession(file))
    feed = verification.example(verification.at_sizes(specs, pipeline)[0], rows)
    for acting in ([], [2], [0, 3]):
        feed["control_scales"][:] = 0
        feed["control_scales"][acting, 1] = 0.5
        assert convolutions(file, feed, "control_0/") == set()
        assert convolutions(file, feed, "control_1/") == ({len(acting)} if acting else set())
        assert convolutions(file, feed, "") == {rows, len(acting)} - {0}


def convolutions(file: Path, feed: dict[str, np.ndarray], prefix: str) -> set[int]:
    """The numbers of rows of all convolutions, by nodes with a prefix, that a call runs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps names
    options.enable_profiling, options.profile_file_prefix = True, str(file.parent / "profile")
    session = onnxruntime.InferenceSession(file, options)
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    return {
        event["args"]["input_type_shape"][0]["float"][0]
        for event in events
        if event["name"].startswith(prefix) and event.get("args", {}).get("op_name") == "Conv"
    }


async def test_a_client_and_the_command_line_send_pictures_to_follow(both: ControlledFolder, tmp_path: Path) -> None:
    size = width, height = SIZES[0]
    painting("edges", size).save(tmp_path / "edges.png")
    depth = png(painting("depth", size))
    asked = {"negative_prompt": NEGATIVE, "seed": 5, "steps": STEPS, "guidance_scale": 5.0, "sampler": "euler"}
    async with serving(load(port=free_port(), models_dir=both.place / "models", num_instances=2)) as running:
        async with Client(running.address) as client:
            [model] = await client.models()
            assert [control.name for control in model.controls] == list(NAMES)
            controls = [Control("depth", depth, 0.9, 0.34), Control("edges", tmp_path / "edges.png", 0.6)]
            pictures = {
                one: np.asarray(await client.generate(PROMPT, controls=given, **asked).image(), int)
                for one, given in {"none": [], "both": controls, "resting": [Control("edges", depth, 0.0)]}.items()
            }
            events = [event async for event in client.generate(PROMPT, controls=controls[::-1], **asked)]
            assert isinstance(events[-1], Finished)
            assert events[-1].origins[0].disposition == "exact", "their order makes no difference"
        command = ["generate", PROMPT, "--negative", NEGATIVE, "--seed", "5", "--steps", str(STEPS), "--guidance", "5"]
        command += ["--sampler", "euler", "--control", "edges=edges.png:0.7:0.2:0.8", "--target", running.address]
        await asyncio.to_thread(safelight, tmp_path, *command)
        assert "controls edges, depth" in await asyncio.to_thread(
            safelight, tmp_path, "models", "--target", running.address
        )
    assert np.array_equal(pictures["none"], pictures["resting"])

    for picture, wishes in (
        (pictures["both"], WISHES[3]),
        (np.asarray(Image.open(tmp_path / "picture.png"), int), WISHES[1]),
    ):
        assert np.abs(picture - np.asarray(both.theirs(wishes, 5, 5.0, size, "euler"), int)).max() <= 1
    assert (width, height) == Image.open(tmp_path / "picture.png").size
