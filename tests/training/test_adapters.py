"""Adapters as peft and diffusers write them: the exported denoiser against peft, row by row of a mixed batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from safelight import Client
from safelight_server.app.server import serving
from safelight_server.catalog import catalog
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.domain.component import Component
from safelight_server.export.exporter import export, round_weights
from safelight_server.export.options import AdapterLayers, ExportFormat, ExportOptions
from safelight_server.sampler import gaussian
from safelight_server.settings import load

from load_tests.ports import free_port
from tests.training import folders

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
ROOM = 8
ALL = ["to_q", "to_k", "to_v", "to_out.0"]


def config(rank: int, alpha: int, targets: list[str], **more: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian", **more)


def randomize(unet: torch.nn.Module, seed: int) -> None:
    """Fills peft's matrices: B begins as zeros there, which change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def write_adapters(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """`wide` as peft saves it, in rank 4 with an alpha for each kind of layer; `narrow` as diffusers does, in rank 2."""
    unet = folders.unet()
    unet.load_state_dict(pipeline.unet.state_dict())
    wide = peft.get_peft_model(unet, config(4, 6, ALL, alpha_pattern={"to_k": 2}, rank_pattern={"to_out.0": 3}))
    randomize(wide, 1)
    wide.save_pretrained(folder / "wide")
    other = folders.unet()
    other.add_adapter(config(2, 4, ["to_q", "to_v"]))
    randomize(other, 2)
    state = peft.get_peft_model_state_dict(other, adapter_name="default")
    facts = other.peft_config["default"].to_dict()
    metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in facts.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder / "narrow", unet_lora_layers=state, unet_lora_adapter_metadata=metadata
    )


SIZE = 16
OPTIONS = ExportOptions(
    "tiny",
    licence="CC0-1.0",
    sizes=((SIZE, SIZE),),
    format=ExportFormat.BOTH,
    adapter_rank=ROOM,
    adapter_layers=AdapterLayers.ATTENTION,
)


@dataclass(frozen=True)
class Exported:
    """A pipeline as diffusers saves it, its export, and a folder of two adapters that were trained for it."""

    pipeline: Path
    models: Path
    trained: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    place, trained = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("trained")
    pipeline = folders.pipeline()
    pipeline.save_pretrained(place / "pipeline")
    folders.spare_encoder(place / "pipeline")
    export(place / "pipeline", place / "models", OPTIONS)
    round_weights(pipeline.unet)
    write_adapters(pipeline, trained)
    return Exported(place / "pipeline", place / "models", trained)


def theirs(exported: Exported, **scales: float) -> StableDiffusionPipeline:
    """diffusers' pipeline with these adapters, loaded by diffusers and peft."""
    pipeline = StableDiffusionPipeline.from_pretrained(exported.pipeline, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        round_weights(network)
    if "wide" in scales:
        loaded = peft.PeftModel.from_pretrained(pipeline.unet, exported.trained / "wide", adapter_name="wide")
        pipeline.unet = loaded.get_base_model()
        pipeline.unet._hf_peft_config_loaded = True
        pipeline.unet.peft_config = loaded.peft_config
    if "narrow" in scales:
        pipeline.load_lora_weights(exported.trained / "narrow", adapter_name="narrow")
    if scales:
        pipeline.set_adapters(list(scales), adapter_weights=list(scales.values()))
    return pipeline


MIXED = [{}, {"wide": 1.0}, {"narrow": 0.7}, {"wide": -0.5, "narrow": 1.3}, {}, {"wide": 0.25}]
"""The adapters of the rows of one batch."""


@pytest.fixture(scope="module")
def batch(exported: Exported) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray]]:
    """The exported denoiser and a batch of it, whose rows have different adapters."""
    rng, rows = np.random.default_rng(3), len(MIXED)
    pipeline = catalog.load(exported.models).get("tiny")
    room = pipeline.manifest.adapters
    library = AdapterLibrary(exported.trained, {"tiny": room})
    feed = {
        "sample": rng.standard_normal((rows, *pipeline.latent_shape(SIZE, SIZE)), np.float32),
        "timestep": rng.uniform(0, 999, rows).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, 77, 16), np.float32),
        "adapter_weights": np.zeros((rows, ROOM, room.width), np.float32),
        "adapter_scales": np.zeros((rows, ROOM), np.float32),
    }
    for row, named in enumerate(MIXED):
        first = 0
        for name, scale in named.items():
            weights = library.weights("tiny", name, library.of("tiny")[name].sha256)
            feed["adapter_weights"][row, first : first + len(weights)] = weights
            feed["adapter_scales"][row, first : first + len(weights)] = scale
            first += len(weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(pipeline.files[Component.DENOISER], options), feed


def test_rows_of_a_mixed_batch_have_the_bits_that_they_have_alone(batch):
    session, feed = batch
    [together] = session.run(None, feed)
    for row in range(len(MIXED)):
        [alone] = session.run(None, {name: array[row : row + 1] for name, array in feed.items()})
        assert np.array_equal(together[row], alone[0]), MIXED[row]
    assert len({row.tobytes() for row in together}) == len(MIXED)


def test_rows_are_those_of_peft(exported, batch):
    session, feed = batch
    [ours] = session.run(None, feed)
    inputs = {name: torch.from_numpy(feed[name]) for name in ("sample", "timestep", "encoder_hidden_states")}
    plain = theirs(exported).unet
    for row, named in enumerate(MIXED):
        unet = theirs(exported, **named).unet
        with torch.no_grad():
            given = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            expected, bare = (one(**given, return_dict=False)[0][0].numpy() for one in (unet, plain))
        assert np.abs(ours[row] - expected).max() <= 1e-5, named
        if named:
            assert np.abs(expected - bare).max() > 1e-2, "the adapters matter"


PICTURES = [{"wide": 1.0}, {"narrow": 0.7}, {"wide": -0.5, "narrow": 1.3}]
PROMPT, SEED, STEPS, GUIDANCE = "a red potion", 7, 4, 5.0


async def test_whole_pictures_are_those_of_diffusers(exported):
    """From the exported folder through a server, with one adapter and with two; within 1/255."""
    settings = load(port=free_port(), models_dir=exported.models, adapters_dir=exported.trained, num_instances=1)
    async with serving(settings) as running, Client(running.address) as client:

        async def ours(**adapters: float) -> np.ndarray:
            drawn = client.generate(PROMPT, seed=SEED, steps=STEPS, guidance_scale=GUIDANCE, adapters=adapters)
            return np.asarray(await drawn.image(), int)

        plain = await ours()
        pictures = [await ours(**scales) for scales in PICTURES]
    noise = torch.from_numpy(gaussian(SEED, 0, 0, (4, SIZE // 2, SIZE // 2)))[None]
    for scales, picture in zip(PICTURES, pictures, strict=True):
        given = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        expected = theirs(exported, **scales)(PROMPT, latents=noise, **given).images[0]
        assert np.abs(picture - np.asarray(expected, int)).max() <= 1, scales
        assert np.abs(picture - plain).max() > 8, "the adapters matter"
