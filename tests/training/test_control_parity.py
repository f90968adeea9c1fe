"""An exported denoiser with control networks against diffusers' ControlNet pipelines, and row by row of mixed batches.

Small random networks of Stable Diffusion 1.5's kind and of SDXL's. The exported denoiser takes the UNet's place in
diffusers' own pipeline, with the rows that the server would give it; pictures agree to 1/255.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from PIL import Image
from safelight_server.engine.latents import Latents, RowControl
from safelight_server.export import controls
from safelight_server.export.components import Denoiser, DenoiserXL
from safelight_server.export.exporter import round_weights
from safelight_server.export.onnx_file import check_parity
from safelight_server.sampler import NoiseSchedule, SamplerSpec, compile_table, controlled_steps

from tests.training import folders
from tests.training.cells import EVERY
from tests.training.test_image_parity import picture_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
STEPS, PROMPT, NEGATIVE, FACTOR = 6, "a red potion", "blurry", 2
SIZES = ((12, 8), (8, 16))
"""(h, w) of latents; the first is that of the training."""
Wish = tuple[int, float, float, float]
"""A control network by its place, with scale, start and end."""
WISHES: list[list[Wish]] = [
    [(0, 1.0, 0.0, 1.0)],
    [(0, 0.7, 0.2, 0.8)],
    [(1, 1.5, 0.0, 0.5)],
    [(0, 0.6, 0.0, 1.0), (1, 0.9, 0.34, 1.0)],
]


class ControlledExport:
    """A pipeline in torch with two control networks, and its exported denoiser."""

    def __init__(self, place: Path, pipeline: Any, denoiser: type, kind: type) -> None:
        torch.set_num_threads(1)
        self.pipeline, self.kind, unet = pipeline, kind, pipeline.unet
        self.networks = [folders.control_network(unet, seed) for seed in range(2)]
        for network in (unet, *self.networks):
            round_weights(network)
        self.module = controls.ControlledDenoiser(denoiser(copy.deepcopy(unet)), copy.deepcopy(self.networks)).eval()
        self.file = place / "denoiser" / "1" / "model.onnx"
        self.examples = [self.example(*size) for size in SIZES]
        with torch.no_grad():
            controls.write_controlled(self.module, self.examples, self.file, FACTOR)
        self.run = session(self.file).run
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
        pipeline.set_progress_bar_config(disable=True)

    def example(self, height: int, width: int) -> dict[str, torch.Tensor]:
        """Inputs of two rows."""
        generator, context = torch.Generator().manual_seed(0), self.pipeline.unet.config.cross_attention_dim
        own = {
            "sample": torch.randn(2, 4, height, width, generator=generator),
            "timestep": torch.tensor([999.0, 12.0]),
            "encoder_hidden_states": torch.randn(2, 77, context, generator=generator),
        }
        if isinstance(self.module.denoiser, DenoiserXL):
            size = [float(FACTOR * height), float(FACTOR * width)]
            own["text_embeds"] = torch.randn(2, 20, generator=generator)
            own["time_ids"] = torch.tensor([[*size, 0.0, 0.0, *size]] * 2)
        return self.module.examples(own, FACTOR)

    def theirs(self, wishes: list[Wish], **asked: Any) -> Image.Image:
        """The picture of diffusers' ControlNet pipeline."""
        names, scales, starts, ends = (one[0] if len(wishes) == 1 else list(one) for one in zip(*wishes, strict=True))
        several = len(wishes) > 1
        networks = [self.networks[name] for name in names] if several else self.networks[names]
        size = asked["width"], asked["height"]
        more = {} if self.kind is StableDiffusionXLControlNetPipeline else {"requires_safety_checker": False}
        made = self.kind(**self.pipeline.components, controlnet=networks, **more)
        made.set_progress_bar_config(disable=True)
        return made(
            PROMPT,
            image=[painting(name, size) for name in names] if several else painting(names, size),
            controlnet_conditioning_scale=scales,
            control_guidance_start=starts,
            control_guidance_end=ends,
            **asked,
        ).images[0]

    def ours(self, wishes: list[Wish], **asked: Any) -> Image.Image:
        """The picture of the pipeline with the exported denoiser in place of its UNet."""
        unet = self.pipeline.unet
        self.pipeline.unet = ExportedUNet(unet, self.run, wishes)
        try:
            return self.pipeline(PROMPT, **asked).images[0]
        finally:
            self.pipeline.unet = unet


class ExportedUNet(torch.nn.Module):
    """Stands for a UNet in diffusers' pipelines, and gives the exported denoiser what `Latents` gives it."""

    def __init__(self, unet: torch.nn.Module, run: Any, wishes: list[Wish]) -> None:
        super().__init__()
        self.config, self.dtype, self.device = unet.config, torch.float32, torch.device("cpu")
        if hasattr(unet, "add_embedding"):
            self.add_embedding = unet.add_embedding
        self._run, self._wishes, self._step = run, wishes, 0
        self._rows: Any = None

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        **_: object,
    ) -> tuple[torch.Tensor]:
        rows = len(sample)
        given = {
            "sample": sample.numpy(),
            "timestep": np.full(rows, float(timestep), np.float32),
            "encoder_hidden_states": encoder_hidden_states.numpy(),
            **{name: tensor.float().numpy() for name, tensor in (added_cond_kwargs or {}).items()},
            **self._controls(rows, sample.shape[1:]),
        }
        self._step += 1
        return (torch.from_numpy(self._run(None, given)[0]),)

    def _controls(self, rows: int, shape: torch.Size) -> dict[str, Any]:
        height, width = FACTOR * shape[1], FACTOR * shape[2]
        if self._rows is None:
            inputs = {"control_images": "control_images", "control_scales": "control_scales"}
            self._rows = Latents(1, tuple(shape), {}, STEPS, inputs, pictures=(2, 3, height, width))
            table = compile_table(SamplerSpec("ddim", "leading"), NoiseSchedule(), "epsilon", STEPS)
            brought = [
                RowControl(
                    place, np.asarray(painting(place, (width, height))), scale, controlled_steps(STEPS, start, end)
                )
                for place, scale, start, end in self._wishes
            ]
            self._rows.claim(table, 1, 1.0, [{}], controls=brought)
        slots = np.zeros(rows, np.intp)
        made = self._rows.rows(slots, slots, slots + self._step)
        return made | {"control_images": made["control_images"].array()}


def painting(place: int, size: tuple[int, int]) -> Image.Image:
    """The picture for a control network."""
    image = picture_of(size)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if place else image


def session(file: Path, **changes: Any) -> onnxruntime.InferenceSession:
    """As the server's runtime has it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for name, value in changes.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


FAMILIES = ("sd15", "sdxl") if EVERY else ("sd15",)
"""Each takes most of a minute to export; CI has one."""


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ControlledExport:
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "sdxl":
        pipeline = folders.sdxl_pipeline(latent=SIZES[0])
        return ControlledExport(place, pipeline, DenoiserXL, StableDiffusionXLControlNetPipeline)
    pipeline = folders.pipeline(unet=folders.unet(sample_size=SIZES[0]))
    return ControlledExport(place, pipeline, Denoiser, StableDiffusionControlNetPipeline)


@torch.no_grad()
def test_the_file_computes_what_torch_does(both: ControlledExport) -> None:
    compared = [*both.examples, *(one for example in both.examples for one in controls.idle(example))]
    check_parity(both.module, compared, both.module.outputs, both.file)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_are_those_of_diffusers(both: ControlledExport, guidance: float, size: tuple[int, int]) -> None:
    height, width = size
    asked = {
        "negative_prompt": NEGATIVE if guidance != 1 else None,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "width": FACTOR * width,
        "height": FACTOR * height,
        "latents": torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(3)),
    }
    plain = np.asarray(both.ours([], **asked), int)
    for wishes in WISHES:
        ours, theirs = (np.asarray(made(wishes, **asked), int) for made in (both.ours, both.theirs))
        assert np.abs(ours - theirs).max() <= 1, wishes
        assert np.abs(ours - plain).max() > 4, "the controls matter"


SCALES = np.array([[1, 0], [0, 0], [0, 2], [0.5, 0.25], [0, 0]], np.float32)
"""Of the rows of a batch by network."""


def mixed(both: ControlledExport, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A batch whose rows use both networks, one, or none."""
    feed = {name: torch.cat([tensor] * 3)[: len(SCALES)].numpy() for name, tensor in both.example(*size).items()}
    feed["sample"] = np.random.default_rng(1).standard_normal(feed["sample"].shape).astype(np.float32)
    return feed | {"control_scales": SCALES}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_rows_of_a_mixed_batch_have_the_bits_that_they_have_alone(
    both: ControlledExport, size: tuple[int, int]
) -> None:
    feed = mixed(both, size)
    [together] = both.run(None, feed)
    [plain] = both.run(None, feed | {"control_scales": np.zeros_like(SCALES)})
    damaged = feed["control_images"].copy()
    damaged[SCALES == 0] = np.nan
    assert np.array_equal(both.run(None, feed | {"control_images": damaged})[0], together)
    for row in range(len(SCALES)):
        [alone] = both.run(None, {name: array[row : row + 1] for name, array in feed.items()})
        assert np.array_equal(together[row], alone[0]), SCALES[row]
        assert np.array_equal(together[row], plain[row]) != SCALES[row].any()


def test_a_network_runs_for_the_rows_that_use_it_and_for_no_other(both: ControlledExport) -> None:
    """Nodes of each network are in the profile of a call for these rows alone."""
    feed = mixed(both, SIZES[0])
    for acting in ([], [2], [0, 3]):
        feed["control_scales"] = np.zeros_like(SCALES)
        feed["control_scales"][acting, 1] = 0.5
        assert convolved_rows(both.file, feed, "control_0/") == set()
        assert convolved_rows(both.file, feed, "control_1/") == {len(acting)} - {0}
        assert convolved_rows(both.file, feed, "") == {len(SCALES), len(acting)} - {0}


def convolved_rows(file: Path, feed: dict[str, np.ndarray], prefix: str) -> set[int]:
    """The numbers of rows of all convolutions that a call runs, of nodes whose names have a prefix."""
    keeps_names = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    prefix_of_file = str(file.parent / "profile")
    profiled = session(
        file, enable_profiling=True, profile_file_prefix=prefix_of_file, graph_optimization_level=keeps_names
    )
    profiled.run(None, feed)
    events = json.loads(Path(profiled.end_profiling()).read_text())
    return {
        event["args"]["input_type_shape"][0]["float"][0]
        for event in events
        if event["name"].startswith(prefix) and event.get("args", {}).get("op_name") == "Conv"
    }
