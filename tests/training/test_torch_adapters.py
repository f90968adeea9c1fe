"""Adapters on the torch runtime, as diffusers saves them: whole pictures against diffusers' pipelines, and mixed batches.

CI has the kinds that differ most; `SAFELIGHT_ALL_PARITY=1 make test-training` has all, and transformers on ONNX Runtime too.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import pytest_asyncio
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from safelight import Accepted, Client, Picture
from safelight_server.app.server import Running
from safelight_server.catalog import catalog, config_pbtxt
from safelight_server.domain.component import Component
from safelight_server.export import memory
from safelight_server.export.adapters import AdaptedConvolution, AdaptedLinear, target_names
from safelight_server.export.exporter import export, load_components, round_weights
from safelight_server.export.options import AdapterLayers, ExportFormat, ExportOptions
from safelight_server.export.source import ExportError
from safelight_server.runtime import verification
from safelight_server.runtime.base import StableRows
from safelight_server.runtime.device_rows import DeviceRows
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.torch_runtime import TorchRuntime
from safelight_server.runtime.verification import InputSpec
from safelight_server.sampler import INITIAL, gaussian

from tests.conftest import eventually
from tests.training import folders
from tests.training.cells import EVERY
from tests.training.serving import cancel_in_a_call, served_on_torch

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.asyncio(loop_scope="module"),
]
PROMPT, SEED, STEPS, GUIDANCE, ROOM = "an old castle at night", 7, 4, 3.0, 8
SIZES = ((16, 24), (32, 16))
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline.

    Attributes:
        make: a small random one.
        usual: the layers that diffusers' training script changes where it is not told others.
        asked: how diffusers' pipeline is asked for `GUIDANCE`.
        format: what is exported.
    """

    make: Callable[[], DiffusionPipeline]
    usual: list[str]
    asked: dict[str, Any]
    format: ExportFormat = ExportFormat.TORCH


T5 = {"max_sequence_length": folders.T5_TOKENS}
KINDS = {
    "sd15": Kind(folders.pipeline, ATTENTION, {"guidance_scale": GUIDANCE}),
    "sdxl": Kind(lambda: folders.sdxl_pipeline(latent=(12, 8)), ATTENTION, {"guidance_scale": GUIDANCE}),
    "flux": Kind(
        lambda: folders.flux_pipeline(is_distilled=True),
        [*ATTENTION, *JOINT, *FEED_FORWARD],
        {"guidance_scale": GUIDANCE, **T5},
        ExportFormat.BOTH if EVERY else ExportFormat.TORCH,
    ),
    "sd3": Kind(
        folders.sd3_pipeline,
        [*ATTENTION, *JOINT],
        {"guidance_scale": GUIDANCE, "negative_prompt": "", **T5},
        ExportFormat.BOTH if EVERY else ExportFormat.TORCH,
    ),
    "z-image": Kind(
        folders.z_image_pipeline,
        ["to_q", "to_k", "to_v"],
        {"guidance_scale": GUIDANCE - 1, "negative_prompt": "", "max_sequence_length": folders.QWEN_TOKENS},
    ),
}


@dataclass(frozen=True)
class Exported:
    """A pipeline of diffusers with the weights as they are exported, its folder of models, and one of its adapters."""

    pipeline: Any
    models: Path
    adapters: Path
    kind: Kind

    @property
    def torch_folder(self) -> Path:
        return self.models / "pipelines" / "tiny" / "1" / "torch"

    def theirs(self, size: tuple[int, int], **scales: float) -> np.ndarray:
        """Diffusers' picture with adapters that diffusers has read."""
        pipeline = self.pipeline
        for name in scales:
            pipeline.load_lora_weights(self.adapters / name, adapter_name=name)
        if scales:
            pipeline.set_adapters(list(scales), adapter_weights=list(scales.values()))
        channels = pipeline.vae.config.latent_channels
        noise = torch.from_numpy(gaussian(SEED, INITIAL, 0, (channels, size[1] // 2, size[0] // 2)))[None]
        if hasattr(pipeline, "_pack_latents"):
            noise = pipeline._pack_latents(noise, *noise.shape)
        given = {"width": size[0], "height": size[1], "num_inference_steps": STEPS, "latents": noise}
        made = pipeline(PROMPT, **given, **self.kind.asked).images[0]
        if scales:
            pipeline.unload_lora_weights()
        return np.asarray(made, int)


def write_adapter(pipeline: Any, part: str, folder: Path, config: peft.LoraConfig, seed: int) -> None:
    """An adapter as diffusers' training scripts save it, with random numbers: B begins as zeros, which change nothing."""
    network = copy.deepcopy(getattr(pipeline, part))
    network.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    facts = network.peft_config["default"].to_dict()
    metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in facts.items()}
    state = peft.get_peft_model_state_dict(network, adapter_name="default")
    named = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(folder, **named)


def made(kind: Kind, place: Path) -> Exported:
    pipeline = kind.make()
    pipeline.save_pretrained(place / "folder")
    sampler = "euler" if hasattr(pipeline, "unet") else ""
    options = ExportOptions(
        "tiny", licence="CC0-1.0", sizes=SIZES, format=kind.format, sampler=sampler, adapter_rank=ROOM
    )
    export(place / "folder", place / "models", options)
    for name in PARTS:
        if hasattr(pipeline, name):
            round_weights(getattr(pipeline, name))
    pipeline.set_progress_bar_config(disable=True)
    if sampler:
        config = pipeline.scheduler.config
        pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="leading")
    part = "unet" if sampler else "transformer"
    every = target_names(getattr(pipeline, part), AdapterLayers.BLOCKS)
    alphas = {"to_k": 2, "w2": 1, "proj_out": 1}
    wide = peft.LoraConfig(r=4, lora_alpha=3, target_modules=every, alpha_pattern=alphas, rank_pattern={"to_out.0": 3})
    write_adapter(pipeline, part, place / "adapters" / "wide", wide, 1)
    usual = peft.LoraConfig(r=2, lora_alpha=4, target_modules=kind.usual)
    write_adapter(pipeline, part, place / "adapters" / "usual", usual, 2)
    return Exported(pipeline, place / "models", place / "adapters", kind)


@pytest.fixture(scope="module", params=KINDS if EVERY else ["sd15", "flux", "z-image"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    return made(KINDS[request.param], tmp_path_factory.mktemp(request.param))


def served(exported: Exported, **settings: Any) -> Any:
    return served_on_torch(exported.models, adapters_dir=exported.adapters, **settings)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(exported: Exported) -> AsyncIterator[Running]:
    async with served(exported) as running:
        yield running


async def ours(running: Running, size: tuple[int, int], **adapters: float) -> np.ndarray:
    wanted = {"width": size[0], "height": size[1], "steps": STEPS, "guidance_scale": GUIDANCE, "cache": "bypass"}
    async with Client(running.address) as client:
        return np.asarray(await client.generate(PROMPT, seed=SEED, adapters=adapters, **wanted).image(), int)


MIXED: list[dict[str, float]] = [{}, {"usual": 0.8}, {"wide": 0.8}, {"wide": -0.5, "usual": 0.8}]


@pytest.mark.parametrize("adapters", MIXED, ids=lambda adapters: "-".join(adapters) or "none")
async def test_a_picture_is_that_of_diffusers(exported, running, adapters):
    """At both sizes."""
    for size in SIZES:
        picture = await ours(running, size, **adapters)
        assert np.abs(picture - exported.theirs(size, **adapters)).max() <= 1
        if adapters:
            assert np.abs(picture - await ours(running, size)).max() > 4, "the adapters matter"


async def test_a_picture_on_onnx_runtime_is_that_of_diffusers(exported):
    """Of a transformer: test_adapters.py has UNets."""
    if exported.kind.format is ExportFormat.TORCH:
        pytest.skip("exported for torch alone")
    async with served(exported, runtime="onnx", num_instances=1) as running:
        for adapters in MIXED:
            picture = await ours(running, SIZES[0], **adapters)
            assert np.abs(picture - exported.theirs(SIZES[0], **adapters)).max() <= 1, adapters


async def test_pictures_of_mixed_batches_are_those_made_alone(running, monkeypatch):
    """With one adapter, two and none, at once: no call of the denoiser ends before all are in."""
    kinds, num_accepted, all_in, run = [*MIXED, *MIXED], 0, asyncio.Event(), running.runtime.run
    calls: list[list[bool]] = []

    async def held(instance, model, component, inputs):
        if component is Component.DENOISER:
            await all_in.wait()
            calls.append((inputs["adapter_scales"] != 0).any(axis=1).tolist())
        return await run(instance, model, component, inputs)

    async def develop(client: Client, adapters: dict[str, float]) -> np.ndarray:
        nonlocal num_accepted
        found = None
        wanted = {"steps": STEPS, "guidance_scale": GUIDANCE, "cache": "bypass", "media_type": "image/png"}
        async for event in client.generate(PROMPT, seed=SEED, adapters=adapters, **wanted):
            if isinstance(event, Accepted):
                num_accepted += 1
                if num_accepted == len(kinds):
                    all_in.set()
            elif isinstance(event, Picture):
                found = np.asarray(event.image(), int)
        assert found is not None
        return found

    monkeypatch.setattr(running.runtime, "run", held)
    async with Client(running.address) as client:
        together = await asyncio.gather(*(develop(client, adapters) for adapters in kinds))
        assert any(len(set(call)) == 2 for call in calls), "rows with and without adapters share a call"
        for adapters, shared in zip(kinds, together, strict=True):
            assert np.abs(shared - await develop(client, adapters)).max() <= 1, adapters


async def test_a_cancelled_generation_ends_and_one_without_adapters_runs(running, monkeypatch):
    await cancel_in_a_call(running, monkeypatch, PROMPT, adapters={"wide": 1.0})
    assert (await ours(running, SIZES[0])).shape == (SIZES[0][1], SIZES[0][0], 3)
    await eventually(lambda: running.inspect().outputs == 0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exact(exported: Exported) -> AsyncIterator[TorchRuntime]:
    """The runtime without a tolerance, so that what it offers has the bits of single rows."""
    runtime = TorchRuntime(
        catalog.load(exported.models, weights="torch"), TorchOptions(num_instances=2, batch_tolerance=0.0)
    )
    await runtime.start()
    yield runtime
    await runtime.close()


def rows_of_denoiser(exported: Exported, rows: int) -> dict[str, np.ndarray]:
    """Example inputs, in which each row has adapters of its own."""
    config = config_pbtxt.read(exported.torch_folder / "configs" / "denoiser.pbtxt")
    specs = [InputSpec(name, shape, name in config.ids) for name, shape in config.rows.items()]
    pipeline = catalog.load(exported.models, weights="torch").get("")
    made = verification.example(verification.at_sizes(specs, pipeline)[0], rows)
    rng = np.random.default_rng(5)
    for name in ("adapter_weights", "adapter_scales"):
        made[name] = 0.1 * rng.standard_normal(made[name].shape, dtype=np.float32)
    return made


def without(given: dict[str, np.ndarray], *rows: int) -> dict[str, np.ndarray]:
    """The same batch with no adapters in these rows."""
    made = {name: array.copy() for name, array in given.items()}
    made["adapter_scales"][list(rows)] = 0
    made["adapter_weights"][list(rows)] = 0
    return made


async def predicted(runtime: TorchRuntime, given: dict[str, np.ndarray], instance: int = 0) -> np.ndarray:
    return (await runtime.run(instance, "tiny", Component.DENOISER, given))["prediction"]


async def test_the_bits_of_a_row_do_not_depend_on_the_adapters_of_others(exported, exact):
    """Of a row with adapters and of one without, whatever the others of a batch of the same size bring."""
    given = rows_of_denoiser(exported, 4)
    all_of_them, bare = await predicted(exact, given), await predicted(exact, without(given, 0, 1, 2, 3))
    for absent in [(0,), (1,), (3,), (0, 1), (0, 3), (1, 2), (2, 3), (0, 1, 2), (0, 2, 3), (1, 2, 3)]:
        found = await predicted(exact, without(given, *absent))
        for row in range(4):
            assert np.array_equal(found[row], (bare if row in absent else all_of_them)[row]), (row, absent)
    assert all(np.abs(all_of_them[row] - bare[row]).max() > 1e-3 for row in range(4)), "the adapters matter"


async def test_rows_of_offered_batches_have_the_bits_that_they_have_alone(exported, exact):
    rows = exact.max_rows("tiny", Component.DENOISER)
    given = rows_of_denoiser(exported, rows)
    for absent in ((), range(rows), range(0, rows, 2), range(1, rows, 2)):
        batch = without(given, *absent)
        found = await predicted(exact, batch)
        for row in range(rows):
            alone = {name: array[row : row + 1] for name, array in batch.items()}
            assert np.array_equal(found[row], (await predicted(exact, alone))[0]), (row, absent)


async def test_rows_without_adapters_cost_nothing_of_them_and_have_the_bits_of_a_denoiser_without_room(
    exported, exact, monkeypatch
):
    given = without(rows_of_denoiser(exported, 3), 0, 1, 2)
    manifest = catalog.load(exported.models, weights="torch").get("").manifest
    plain = load_components(exported.torch_folder, manifest.model_copy(update={"adapters": None}))["denoiser"]
    assert plain.adapters is None
    own = {name: torch.from_numpy(array) for name, array in given.items() if not name.startswith("adapter_")}
    with torch.inference_mode():
        wanted = plain(**own).numpy()

    def computed(*_: Any) -> None:
        raise AssertionError("low-rank products for no row")

    def read(_: Any) -> None:
        raise AssertionError("weights that no row has are copied")

    for layer in (AdaptedLinear, AdaptedConvolution):
        monkeypatch.setattr(layer, "_product", computed)
    stable = StableRows(given["adapter_weights"].shape[1:], np.zeros(3, np.int64), read)
    assert np.array_equal(await predicted(exact, {**given, "adapter_weights": stable}), wanted)


async def test_a_call_that_runs_beside_another_has_its_own_adapters(exported, exact, monkeypatch):
    """Instances share a network. The first call is held in its first layer until the second one has ended."""
    given = rows_of_denoiser(exported, 2)
    with_them, bare = await predicted(exact, given), await predicted(exact, without(given, 0, 1))
    product, first_is_in, second_is_out = AdaptedLinear._product, threading.Event(), threading.Event()

    def held(self: AdaptedLinear, *given: torch.Tensor) -> torch.Tensor:
        if not first_is_in.is_set():
            first_is_in.set()
            assert second_is_out.wait(60)
        return product(self, *given)

    monkeypatch.setattr(AdaptedLinear, "_product", held)
    first = asyncio.create_task(predicted(exact, given, 0))
    assert await asyncio.to_thread(first_is_in.wait, 60)
    try:
        second = await predicted(exact, without(given, 0, 1), 1)
    finally:
        second_is_out.set()
    assert np.array_equal(second, bare)
    assert np.array_equal(await first, with_them)


async def test_half_precision_is_near_and_takes_adapters(exported):
    """bfloat16, which CPUs have."""
    async with served(exported, torch_dtype="bfloat16", num_instances=1) as running:
        picture = await ours(running, SIZES[0], wide=0.8)
    assert np.abs(picture - exported.theirs(SIZES[0], wide=0.8)).mean() < 12


def test_the_layers_that_training_scripts_change_are_targets(exported):
    facts = json.loads((exported.models / "pipelines/tiny/1/pipeline.json").read_text())
    names = {target["name"] for target in facts["adapters"]["targets"]}
    assert facts["adapters"]["max_rank"] == ROOM
    assert all(any(name.endswith(f".{layer}") for name in names) for layer in exported.kind.usual)


def test_a_row_takes_at_least_the_bytes_of_its_adapters(exported):
    """So that a batch whose weights do not fit into memory is not offered."""
    facts = json.loads((exported.models / "pipelines/tiny/1/pipeline.json").read_text())
    room = catalog.load(exported.models, weights="torch").get("").manifest.adapters
    assert facts["components"]["denoiser"]["row_bytes"] >= 4 * ROOM * room.width
    module = torch.nn.Module()
    module.forward = lambda adapter_weights: adapter_weights[:, 0]  # takes nothing itself
    assert memory.torch_row_bytes(module, {"adapter_weights": torch.zeros(2, 64, 1 << 16)}) >= 4 * 64 << 16


@pytest.mark.parametrize("change", ["name", "outputs"])
def test_a_manifest_whose_targets_are_not_in_the_denoiser_is_refused(exported, change):
    manifest = catalog.load(exported.models, weights="torch").get("").manifest
    first, *others = manifest.adapters.targets
    other = first.model_copy(update={change: "blocks.99.to_q" if change == "name" else first.outputs + 1})
    room = manifest.adapters.model_copy(update={"targets": (other, *others)})
    with pytest.raises(ExportError, match=f"adapters: {other.name} is "):
        load_components(exported.torch_folder, manifest.model_copy(update={"adapters": room}))


def test_a_row_is_copied_to_a_device_once_and_stays_while_calls_bring_it():
    """Rows of one version once, whatever their places; of a call that failed nothing stays."""
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    uploads: list[list[float]] = []

    def upload(array: np.ndarray) -> torch.Tensor:
        uploads.append(array[:, 0].tolist())
        return torch.from_numpy(array)

    def called(kept: DeviceRows, *places: int) -> list[list[float]]:
        uploads.clear()
        rows = StableRows((2,), np.array([10 + place for place in places]), lambda at: table[np.array(places)[at]])
        found = kept.batch("weights", rows, upload)
        assert found.tolist() == table[list(places)].tolist()
        return uploads

    kept = DeviceRows()
    assert called(kept, 0, 1, 0) == [[0.0], [2.0]]
    assert called(kept, 1, 0, 3) == [[6.0]]
    assert called(kept, 3) == []
    assert called(kept, 0, 3) == [[0.0]], "a row that a call did not bring has gone"
    with pytest.raises(IndexError):
        kept.batch("weights", StableRows((2,), np.array([99]), lambda at: table[np.array([99])]), upload)
    assert called(kept, 3) == [[6.0]]
    kept.clear()
    assert called(kept, 3) == [[6.0]]
