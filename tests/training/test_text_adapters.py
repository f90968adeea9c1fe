"""Adapters that change the text encoder too, as diffusers and kohya write them: whole pictures against diffusers' pipelines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safelight import Client
from safelight_server.app.server import serving
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.catalog import load_pipeline
from safelight_server.export.adapters import target_names
from safelight_server.export.exporter import round_weights, token_ids
from safelight_server.export.options import AdapterLayers
from safelight_server.export.text_adapters import text_adapters_of, text_room
from safelight_server.sampler import gaussian
from safelight_server.settings import load
from safetensors.torch import save_file

from load_tests.ports import free_port
from tests.training import folders
from tests.training.exports import exported_once
from tests.training.test_adapters import OPTIONS, ROOM, SIZE

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
SEED, STEPS = 7, 4
PROMPT, NEGATIVE = "a red potion", "blurry, ugly!"
OF_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OF_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
Make = Callable[[], StableDiffusionPipeline | StableDiffusionXLPipeline]


def encoders(pipeline: Any) -> dict[str, torch.nn.Module]:
    names = ("text_encoder", "text_encoder_2")
    return {name: found for name in names if (found := getattr(pipeline, name, None)) is not None}


def write_kohya(make: Make, place: Path) -> None:
    """`kohya`: all layers of the text encoders and the UNet's attention, as sd-scripts write it by default."""
    pipeline, generator, made = make(), torch.Generator().manual_seed(3), {}
    names = target_names(pipeline.unet, AdapterLayers.ATTENTION)
    targets = [(f"unet.{name}", pipeline.unet.get_submodule(name)) for name in names]
    layers = [(f"lora_unet_{name[5:]}", layer.in_features, layer.out_features) for name, layer in targets]
    is_sdxl = "text_encoder_2" in encoders(pipeline)
    short = {"text_encoder": "lora_te1" if is_sdxl else "lora_te", "text_encoder_2": "lora_te2"}
    for target in text_room(text_adapters_of(pipeline), ROOM)["targets"]:
        encoder, _, name = target["name"].partition(".")
        layers.append((f"{short[encoder]}_{name}", target["inputs"], target["outputs"]))
    for name, inputs, outputs in layers:
        key = name.replace(".", "_")
        made[f"{key}.lora_down.weight"] = 0.3 * torch.randn(3, inputs, generator=generator)
        made[f"{key}.lora_up.weight"] = 0.3 * torch.randn(outputs, 3, generator=generator)
        made[f"{key}.alpha"] = torch.tensor(2.0)
    place.mkdir(parents=True)
    save_file(made, place / "kohya.safetensors")


def write_trained(make: Make, place: Path, networks: Iterable[str], seed: int) -> None:
    """What diffusers saves of adapters that peft has added to these networks, with their configurations."""
    pipeline, generator, given = make(), torch.Generator().manual_seed(seed), {}
    for name in networks:
        network = getattr(pipeline, name)
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=OF_ATTENTION if name == "unet" else OF_TEXT[::2])
        network.add_adapter(config)
        for parameter_name, parameter in network.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
        facts = network.peft_config["default"].to_dict()
        told = {key: sorted(value) if isinstance(value, set) else value for key, value in facts.items()}
        state = peft.get_peft_model_state_dict(network, adapter_name="default")
        given |= {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": told}
    type(pipeline).save_lora_weights(place, **given)


@dataclass
class Exported:
    """A pipeline's folder, its export, and three adapters: `kohya`, `both` by diffusers, and `word` of the text alone."""

    make: Make
    folder: Path

    def theirs(self, **scales: float) -> Any:
        """diffusers' pipeline with adapters that diffusers has loaded."""
        pipeline = self.make()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
        for network in (pipeline.unet, pipeline.vae, *encoders(pipeline).values()):
            round_weights(network)
        for name in scales:
            pipeline.load_lora_weights(self.folder / "adapters" / name, adapter_name=name)
        if scales:
            pipeline.set_adapters(list(scales), adapter_weights=list(scales.values()))
        return pipeline


@pytest.fixture(scope="module", params=[folders.pipeline, folders.sdxl_pipeline], ids=["sd", "sdxl"])
def exported(
    request: pytest.FixtureRequest, session_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    torch.set_num_threads(1)
    made = Exported(request.param, tmp_path_factory.mktemp("text_adapters"))
    pipeline = made.make()
    write_kohya(made.make, made.folder / "adapters" / "kohya")
    names = list(encoders(pipeline))
    write_trained(made.make, made.folder / "adapters" / "both", ["unet", *names], 4)
    write_trained(made.make, made.folder / "adapters" / "word", names, 5)
    options = OPTIONS if made.make is folders.pipeline else replace(OPTIONS, adapter_layers=AdapterLayers.BLOCKS)
    place = exported_once(session_folder, made.make.__name__, options)
    (made.folder / "models").symlink_to(place / "models")
    return made


KINDS: list[tuple[dict[str, float], dict[str, Any]]] = [
    ({}, {"guidance_scale": 5.0}),
    ({"kohya": 0.8}, {"guidance_scale": 5.0}),
    ({"kohya": 0.8}, {"guidance_scale": 1.0}),
    ({"kohya": 0.8}, {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
    ({"both": 0.8}, {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
    ({"word": 1.0}, {"guidance_scale": 5.0}),
    ({"kohya": 0.5, "both": -0.7}, {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
    ({"both": 0.8, "word": 0.6}, {"guidance_scale": 1.0}),
]


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
async def test_whole_pictures_are_those_of_diffusers(exported, runtime):
    """Through a server, all at once and each alone, on ONNX Runtime bit-equal; and within 1/255 of diffusers' pictures."""
    settings = load(
        port=free_port(),
        models_dir=exported.folder / "models",
        adapters_dir=exported.folder / "adapters",
        num_instances=1,
        runtime=runtime,
    )
    tolerance = 0 if runtime == "onnx" else 1
    async with serving(settings) as running, Client(running.address) as client:
        assert list(running.catalog.adapters.of("tiny")) == ["both", "kohya", "word"]

        async def ours(adapters: dict[str, float], given: dict[str, Any]) -> np.ndarray:
            drawn = client.generate(PROMPT, seed=SEED, steps=STEPS, adapters=adapters, cache="bypass", **given)
            return np.asarray(await drawn.image(), int)

        together = await asyncio.gather(*(ours(*kind) for kind in KINDS))
        for kind, picture in zip(KINDS, together, strict=True):
            assert np.abs(await ours(*kind) - picture).max() <= tolerance, kind
    noise = torch.from_numpy(gaussian(SEED, 0, 0, (4, SIZE // 2, SIZE // 2)))[None]
    for (scales, given), picture in zip(KINDS, together, strict=True):
        size = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS}
        expected = exported.theirs(**scales)(PROMPT, latents=noise, **size, **given).images[0]
        assert np.abs(picture - np.asarray(expected, int)).max() <= 1, (scales, given)
        if scales:
            plain = exported.theirs()(PROMPT, latents=noise, **size, **given).images[0]
            assert np.abs(picture - np.asarray(plain, int)).max() > 8, "the adapters matter"


MIXED = [{}, {"kohya": 1.0}, {"word": 0.7}, {"kohya": -0.5, "both": 1.3}, {}, {"word": 0.25}]
TEXTS = [PROMPT, PROMPT, NEGATIVE, "a castle", "", "the old ship at night"]


def test_prompts_of_a_mixed_batch_have_the_bits_that_they_have_alone_and_are_those_of_peft(exported):
    [path] = (exported.folder / "models" / "pipelines" / "tiny").glob("*/pipeline.json")
    pipeline = load_pipeline(path, exported.folder / "models" / "repository")
    room, text_room = pipeline.manifest.adapters, pipeline.manifest.text_adapters
    assert room is not None and text_room is not None
    library = AdapterLibrary(exported.folder / "adapters", {"tiny": room}, text_rooms={"tiny": text_room})
    rows = len(MIXED)
    feed = {
        "input_ids": token_ids(exported.make(), TEXTS).numpy(),
        "adapter_weights": np.zeros((rows, ROOM, text_room.width), np.float32),
        "adapter_scales": np.zeros((rows, ROOM), np.float32),
    }
    for row, scales in enumerate(MIXED):
        first = 0
        for name, scale in scales.items():
            weights = library.weights("tiny", name, library.of("tiny")[name].sha256)[:, room.width :]
            feed["adapter_weights"][row, first : first + len(weights)] = weights
            feed["adapter_scales"][row, first : first + len(weights)] = scale
            first += len(weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(pipeline.files["text_encoder"], options)
    together = session.run(None, feed)
    for row in range(rows):
        alone = session.run(None, {name: array[row : row + 1] for name, array in feed.items()})
        assert all(np.array_equal(one[row], other[0]) for one, other in zip(together, alone, strict=True)), row
    for row, (text, scales) in enumerate(zip(TEXTS, MIXED, strict=True)):
        expected = embeddings(exported.theirs(**scales), text)
        assert np.abs(together[0][row] - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max()), scales
        if scales:
            assert np.abs(expected - embeddings(exported.theirs(), text)).max() > 1e-2, "the adapters matter"


def embeddings(pipeline: Any, text: str) -> np.ndarray:
    """diffusers' embedding of a prompt; of an empty one SDXL has zeros."""
    with torch.no_grad():
        if isinstance(pipeline, StableDiffusionXLPipeline):
            found = pipeline.encode_prompt(text, do_classifier_free_guidance=False)[0][0].numpy()
            return found if text else np.zeros_like(found)
        return pipeline.encode_prompt(text, "cpu", 1, False)[0][0].numpy()
