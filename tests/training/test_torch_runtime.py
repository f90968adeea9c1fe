"""Small pipelines of Stable Diffusion and SDXL on the torch runtime, through gRPC, beside diffusers.

test_models_page.py has ONNX Runtime and torch side by side, on one export.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import pytest_asyncio
import torch
import transformers
from diffusers import EulerDiscreteScheduler
from safelight import Accepted, Client, Picture, Preview, Progress
from safelight_server.app.errors import StartError
from safelight_server.app.server import Running
from safelight_server.catalog import catalog
from safelight_server.catalog.catalog import ManifestError
from safelight_server.domain.component import Component
from safelight_server.export.exporter import export, round_weights
from safelight_server.export.options import ExportFormat, ExportOptions
from safelight_server.runtime import verification
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.torch_runtime import TorchRuntime
from safelight_server.sampler import gaussian

from tests.conftest import eventually
from tests.training import folders
from tests.training.serving import cancel_in_a_call, served_on_torch

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.asyncio(loop_scope="module"),
]
SIZES = ((16, 24), (32, 16))
PROMPT, SEED, STEPS, GUIDANCE = "A red potion, wow! 8k!!", 7, 6, 5.0
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Exported:
    """A pipeline of diffusers with the weights as they are exported, and its folder of models, for torch alone."""

    pipeline: Any
    models: Path


def made(kind: str, place: Path) -> Exported:
    pipeline = folders.pipeline() if kind == "sd15" else folders.sdxl_pipeline(latent=(12, 8))
    pipeline.save_pretrained(place / "folder")
    options = ExportOptions("tiny", licence="CC0-1.0", sizes=SIZES, format=ExportFormat.TORCH, sampler="euler")
    export(place / "folder", place / "models", options)
    for name in NETWORKS:
        if hasattr(pipeline, name):
            round_weights(getattr(pipeline, name))
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="leading")
    return Exported(pipeline, place / "models")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Like Stable Diffusion 1.5."""
    torch.set_num_threads(1)
    return made("sd15", tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Like SDXL."""
    torch.set_num_threads(1)
    return made("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(exported: Exported) -> AsyncIterator[Running]:
    async with served_on_torch(exported.models) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running_sdxl(sdxl: Exported) -> AsyncIterator[Running]:
    async with served_on_torch(sdxl.models) as running:
        yield running


async def picture(client: Client, **options: Any) -> np.ndarray:
    made = await client.generate(PROMPT, **{"seed": SEED, "steps": STEPS, "guidance_scale": GUIDANCE} | options).image()
    return np.asarray(made, int)


def theirs(pipeline: Any, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    noise = torch.from_numpy(gaussian(SEED, 0, 0, (4, height // 2, width // 2)))[None]
    given = {"height": height, "width": width, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return np.asarray(pipeline(PROMPT, latents=noise, **given).images[0], int)


@pytest.mark.parametrize("size", SIZES, ids=str)
async def test_a_picture_is_that_of_diffusers(exported, running, size):
    wanted = {"width": size[0], "height": size[1]}
    async with Client(running.address) as client:
        ours = await picture(client, **wanted)
        [model] = await client.models()
    assert (model.runtime, model.name) == ("torch", "models/tiny")
    assert np.abs(ours - theirs(exported.pipeline, size)).max() <= 1


@pytest.mark.parametrize("size", SIZES, ids=str)
async def test_a_picture_of_sdxl_is_that_of_diffusers(sdxl, running_sdxl, size):
    async with Client(running_sdxl.address) as client:
        ours = await picture(client, width=size[0], height=size[1])
    assert np.abs(ours - theirs(sdxl.pipeline, size)).max() <= 1


async def test_a_generation_shows_previews_and_says_how_equal_batches_are(running):
    async with Client(running.address) as client:
        asked = client.generate(PROMPT, seed=SEED, steps=STEPS, preview_every=1)
        events = [event async for event in asked]
    [accepted] = [event for event in events if isinstance(event, Accepted)]
    assert accepted.batch_tolerance == pytest.approx(1e-5)
    assert "-float32-within:1e-05-" in accepted.numerics_id
    assert any(isinstance(event, Preview) and event.data for event in events)
    assert sum(isinstance(event, Picture) for event in events) == 1


async def test_clients_see_in_the_list_of_models_that_batches_are_within_a_tolerance(running):
    async with Client(running.address) as client:
        [model] = await client.models()
    assert any("within 1e-05" in note for note in model.notes)


async def test_pictures_that_share_batches_are_those_made_alone(running_sdxl, monkeypatch):
    """Of several samplers, lengths and guidance scales, at once: no call of the denoiser ends before all are in."""
    kinds = [
        {"seed": seed, "steps": steps, "sampler": sampler, "guidance_scale": guidance}
        for seed, (steps, sampler, guidance) in enumerate(
            [(6, "euler", 5.0), (9, "ddim", 1.0), (7, "dpmpp_2m", 3.0), (8, "euler_ancestral", 5.0)] * 2
        )
    ]
    sizes, accepted, all_in, run = [], [], asyncio.Event(), running_sdxl.runtime.run

    async def held(instance, model, component, inputs):
        if component is Component.DENOISER:
            await all_in.wait()
        return await run(instance, model, component, inputs)

    async def develop(client: Client, **options: Any) -> np.ndarray:
        found = None
        async for event in client.generate(PROMPT, cache="bypass", media_type="image/png", **options):
            if isinstance(event, Accepted):
                accepted.append(event)
                if len(accepted) == len(kinds):
                    all_in.set()
            elif isinstance(event, Progress):
                sizes.append(event.batch_size)
            elif isinstance(event, Picture):
                found = np.asarray(event.image(), int)
        assert found is not None
        return found

    monkeypatch.setattr(running_sdxl.runtime, "run", held)
    async with Client(running_sdxl.address) as client:
        together = await asyncio.gather(*(develop(client, **kind) for kind in kinds))
        assert max(sizes) > 1
        for kind, shared in zip(kinds, together, strict=True):
            assert np.abs(shared - await develop(client, **kind)).max() <= 1, kind


async def test_rows_of_every_offered_batch_are_within_the_tolerance(exported):
    """Of a tolerance that the default would allow for, many times over."""
    made = catalog.load(exported.models, weights="torch")
    runtime = TorchRuntime(made, TorchOptions(num_instances=1, batch_tolerance=1e-5))
    await runtime.start()
    try:
        pipeline = made.get("")
        rows = runtime.max_rows("tiny", Component.DENOISER)
        assert rows >= verification.ALWAYS_ROWS
        shapes = {name: np.shape(array)[1:] for name, array in denoiser_inputs(pipeline, 1).items()}
        given = verification.example(
            [verification.InputSpec(name, tuple(shape)) for name, shape in shapes.items()], rows
        )
        [batch] = (await runtime.run(0, "tiny", Component.DENOISER, given)).values()
        for row in range(rows):
            one = {name: array[row : row + 1] for name, array in given.items()}
            [single] = (await runtime.run(0, "tiny", Component.DENOISER, one)).values()
            assert np.abs(batch[row : row + 1] - single).max() <= 1e-5 * np.abs(single).max()
    finally:
        await runtime.close()


def denoiser_inputs(pipeline: Any, rows: int) -> dict[str, np.ndarray]:
    """Zeros of the shapes at the default size."""
    size = pipeline.manifest.sizes[0]
    latent = pipeline.latent_shape(size.width_px, size.height_px)
    of = {"sample": latent, "timestep": (), "encoder_hidden_states": (77, 16)}
    return {name: np.zeros((rows, *of[name]), np.float32) for name in pipeline.manifest.inputs}


async def test_a_cancelled_generation_ends_and_the_next_one_runs(running, monkeypatch):
    await cancel_in_a_call(running, monkeypatch, PROMPT)
    async with Client(running.address) as client:
        assert (await picture(client)).shape == (SIZES[0][1], SIZES[0][0], 3)
    await eventually(lambda: running.inspect().outputs == 0)


async def test_exact_batches_have_another_name_and_the_bits_of_single_rows(exported):
    """A tolerance of 0 offers the batches that are bit-equal here, which may be those of one row alone."""
    made = catalog.load(exported.models, weights="torch")
    runtime = TorchRuntime(made, TorchOptions(num_instances=1, batch_tolerance=0.0))
    within = TorchRuntime(made, TorchOptions(num_instances=1))
    try:
        await runtime.start()
        assert runtime.batch_tolerance("tiny") == 0
        assert "-exact-" in runtime.numerics_id("tiny")
        libraries = (f"{module.__name__}-{module.__version__}-" for module in (torch, diffusers, transformers))
        assert "".join(libraries) in runtime.numerics_id("tiny"), "other versions of the networks give other bits"
        assert runtime.numerics_id("tiny") != within.numerics_id("tiny")
        rows = runtime.max_rows("tiny", Component.DECODER)
        latent = np.random.default_rng(0).standard_normal((rows, *made.get("").latent_shape(*SIZES[0]))).astype("f")
        batch = (await runtime.run(0, "tiny", Component.DECODER, {"latent": latent}))["image"]
        for row in range(rows):
            single = (await runtime.run(0, "tiny", Component.DECODER, {"latent": latent[row : row + 1]}))["image"]
            assert np.array_equal(batch[row : row + 1], single)
    finally:
        await runtime.close()
        await within.close()


def test_a_model_for_torch_alone_has_no_onnx_files(sdxl):
    assert not list(sdxl.models.glob("**/*.onnx"))
    with pytest.raises(ManifestError, match="exported for torch alone, without ONNX files: export it with --format"):
        catalog.load(sdxl.models)


@pytest.mark.parametrize(
    ("device", "named"),
    [("tpu", "tpu: must be auto, cpu or cuda"), ("cuda:99", "there is no cuda:99"), ("cpu,cpu", "different GPUs")],
)
async def test_a_device_that_is_not_there_is_named(exported, device, named):
    with pytest.raises(StartError, match=f"torch_device: .*{named}"):
        async with served_on_torch(exported.models, torch_device=device):
            pass


@pytest.mark.parametrize("damage", ["changed", "more"])
def test_files_that_are_not_those_of_the_manifest_are_refused(exported, tmp_path, damage):
    shutil.copytree(exported.models, tmp_path / "models")
    [folder] = tmp_path.glob("models/pipelines/tiny/1/torch")
    if damage == "changed":
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    else:
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ManifestError, match=r"sha256 is|model\.bin is not in the manifest"):
        catalog.load(tmp_path / "models", weights="torch")


async def test_half_precision_is_near_and_has_another_name(exported):
    """bfloat16, which CPUs have."""
    async with served_on_torch(exported.models, torch_dtype="bfloat16") as running, Client(running.address) as client:
        ours = await picture(client, width=SIZES[0][0], height=SIZES[0][1])
        [model] = await client.models()
    assert "-bfloat16-within:0.05-" in model.numerics_id
    assert np.abs(ours - theirs(exported.pipeline, SIZES[0])).mean() < 8
