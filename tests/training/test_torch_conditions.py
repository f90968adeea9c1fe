"""Control networks and image prompts on the torch runtime, through gRPC, against diffusers' own pipelines, to 1/255.

One small pipeline like Stable Diffusion 1.5 with two control networks, an IP-Adapter and room for adapters; in
`SAFELIGHT_ALL_PARITY=1 make test-training` one like SDXL too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from safelight import Client, Control
from safelight_server.app.server import Running
from safelight_server.catalog import catalog, config_pbtxt
from safelight_server.domain.component import Component
from safelight_server.export import torch_files
from safelight_server.export.controls import ControlNetwork
from safelight_server.export.exporter import export, round_weights
from safelight_server.export.options import ExportFormat, ExportOptions
from safelight_server.runtime import verification
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.torch_runtime import TorchRuntime
from safelight_server.runtime.verification import InputSpec
from safelight_server.sampler import gaussian
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.training import folders
from tests.training.cells import EVERY
from tests.training.serving import served_on_torch
from tests.training.test_image_parity import picture_of

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.asyncio(loop_scope="module"),
]
PROMPT, SEED, STEPS, GUIDANCE = "a red potion", 7, 6, 5.0
SIZES = ((16, 24), (32, 16))
NAMES = ("edges", "depth")
FAMILIES = ("sd15", "sdxl") if EVERY else ("sd15",)
Wish = tuple[str, float, float, float]
"""A control network with scale, start and end."""
CASES: list[tuple[list[Wish], float]] = [
    ([("edges", 1.0, 0.0, 1.0)], 0.0),
    ([("edges", 1.8, 0.2, 0.8), ("depth", 2.5, 0.34, 1.0)], 0.0),
    ([], 0.7),
    ([("depth", 1.5, 0.0, 0.5)], 1.0),
]
"""The control networks of a picture, and the scale of its image prompt; 0: it has none."""


@dataclass(frozen=True)
class Exported:
    """A pipeline of diffusers with its control networks, and its folder of models, with the pictures for requests."""

    pipeline: Any
    networks: dict[str, Any]
    place: Path

    @property
    def models(self) -> Path:
        return self.place / "models"

    def theirs(self, wishes: list[Wish], image_scale: float, size: tuple[int, int]) -> np.ndarray:
        """Diffusers' picture."""
        shape = (4, size[1] // 2, size[0] // 2)
        asked: dict[str, Any] = {
            "latents": torch.from_numpy(gaussian(SEED, 0, 0, shape))[None],
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "ip_adapter_image": picture_of((50, 37)),
            "width": size[0],
            "height": size[1],
        }
        made = self.pipeline
        if wishes:
            is_sdxl = hasattr(made, "text_encoder_2")
            kind = StableDiffusionXLControlNetPipeline if is_sdxl else StableDiffusionControlNetPipeline
            more = {} if is_sdxl else {"requires_safety_checker": False}
            made = kind(**made.components, controlnet=[self.networks[name] for name, *_ in wishes], **more)
            made.set_progress_bar_config(disable=True)
            names, scales, starts, ends = (list(one) for one in zip(*wishes, strict=True))
            asked |= {"image": [painting(name, size) for name in names], "controlnet_conditioning_scale": scales}
            asked |= {"control_guidance_start": starts, "control_guidance_end": ends}
        made.set_ip_adapter_scale(image_scale)
        return np.asarray(made(PROMPT, **asked).images[0], int)

    async def ours(self, running: Running, wishes: list[Wish], image_scale: float, size: tuple[int, int]) -> np.ndarray:
        given: dict[str, Any] = {"width": size[0], "height": size[1], "steps": STEPS, "guidance_scale": GUIDANCE}
        files = {name: self.place / f"{name}-{size[0]}.png" for name, *_ in wishes}
        for name, file in files.items():
            painting(name, size).save(file)
        given["controls"] = [
            Control(name, files[name], scale=scale, start=start, end=end) for name, scale, start, end in wishes
        ]
        if image_scale:
            picture_of((50, 37)).save(self.place / "prompt.png")
            given |= {"image_prompt": self.place / "prompt.png", "image_prompt_scale": image_scale}
        async with Client(running.address) as client:
            return np.asarray(await client.generate(PROMPT, seed=SEED, **given).image(), int)


def painting(name: str, size: tuple[int, int]) -> Any:
    """The picture for a control network."""
    image = picture_of(size)
    return image.rotate(180) if name == "depth" else image


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    place, latent = tmp_path_factory.mktemp(request.param), (12, 8)
    is_sdxl = request.param == "sdxl"
    pipeline = folders.sdxl_pipeline(latent) if is_sdxl else folders.pipeline(unet=folders.unet(sample_size=latent))
    pipeline.save_pretrained(place / "folder")
    networks = {name: folders.control_network(pipeline.unet, seed) for seed, name in enumerate(NAMES)}
    for name, network in networks.items():
        network.save_pretrained(place / name)
        round_weights(network)
    given = folders.ip_adapter(pipeline.unet, place / "ip")
    options = ExportOptions(
        "tiny",
        licence="CC0-1.0",
        sizes=SIZES,
        format=ExportFormat.TORCH,
        sampler="euler",
        adapter_rank=2,
        controls=tuple((name, place / name) for name in NAMES),
        image_prompt=given,
    )
    export(place / "folder", place / "models", options)
    pipeline.load_ip_adapter(str(given), subfolder="", weight_name=folders.IP_ADAPTER)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"):
        if hasattr(pipeline, name):
            round_weights(getattr(pipeline, name))
    config = folders.SDXL_SCHEDULER if is_sdxl else pipeline.scheduler.config
    pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="leading")
    edge = pipeline.image_encoder.config.image_size
    pipeline.feature_extractor = CLIPImageProcessorPil(size=edge, crop_size=edge)
    pipeline.set_progress_bar_config(disable=True)
    return Exported(pipeline, networks, place)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(exported: Exported) -> AsyncIterator[Running]:
    async with served_on_torch(exported.models) as running:
        yield running


@pytest.mark.parametrize(("wishes", "image_scale"), CASES)
async def test_a_picture_is_that_of_diffusers(exported, running, wishes, image_scale):
    """At both sizes."""
    for size in SIZES:
        picture = await exported.ours(running, wishes, image_scale, size)
        assert np.abs(picture - exported.theirs(wishes, image_scale, size)).max() <= 1
        assert np.abs(picture - await exported.ours(running, [], 0.0, size)).max() > 4, "they matter"


async def test_half_precision_is_near(exported):
    """bfloat16, which CPUs have."""
    wishes, scale = CASES[3]
    async with served_on_torch(exported.models, torch_dtype="bfloat16", num_instances=1) as running:
        picture = await exported.ours(running, wishes, scale, SIZES[0])
    assert np.abs(picture - exported.theirs(wishes, scale, SIZES[0])).mean() < 12


async def test_rows_of_a_mixed_batch_are_those_made_alone_and_networks_run_for_the_rows_that_use_them(
    exported, monkeypatch
):
    made = catalog.load(exported.models, weights="torch")
    runtime = TorchRuntime(made, TorchOptions(num_instances=1))
    await runtime.start()
    try:
        file = made.get("").torch_folder / "configs" / "denoiser.pbtxt"
        config = config_pbtxt.read(file)
        specs = [InputSpec(name, shape, name in config.ids) for name, shape in config.rows.items()]
        given = verification.example(verification.at_sizes(specs, made.get(""))[0], 5)
        given["control_scales"] = np.array([[1, 0], [0, 0], [0, 2], [0.5, 0.25], [0, 0]], np.float32)
        given["image_prompt_scale"] = np.array([0, 0.5, 0, 1, 0], np.float32)
        seen: list[int] = []
        forward = ControlNetwork.forward

        def counted(self: ControlNetwork, sample: torch.Tensor, *rest: Any, **named: Any) -> Any:
            seen.append(len(sample))
            return forward(self, sample, *rest, **named)

        monkeypatch.setattr(ControlNetwork, "forward", counted)
        [together] = (await runtime.run(0, "tiny", Component.DENOISER, given)).values()
        assert seen == [2, 2]
        for row in range(5):
            one = {name: array[row : row + 1] for name, array in given.items()}
            [alone] = (await runtime.run(0, "tiny", Component.DENOISER, one)).values()
            assert np.abs(together[row] - alone[0]).max() <= 1e-5 * np.abs(alone).max()
        seen.clear()
        plain = given | {"control_scales": np.zeros_like(given["control_scales"])}
        [bare] = (await runtime.run(0, "tiny", Component.DENOISER, plain)).values()
        assert not seen
        differs = [not np.array_equal(a, b) for a, b in zip(together, bare, strict=True)]
        assert differs == [True, False, True, True, False], "a row without a network has its bits whatever others use"
    finally:
        await runtime.close()


def test_the_folder_has_the_networks_as_diffusers_saves_them(exported):
    [folder] = exported.models.glob("pipelines/tiny/1/torch")
    files = catalog.load(exported.models, weights="torch").get("").manifest.torch.files
    for name in NAMES:
        assert f"{torch_files.CONTROLS}/{name}/diffusion_pytorch_model.safetensors" in files
    assert f"{torch_files.IMAGE_PROMPT}/image_encoder/model.safetensors" in files
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt")]
