"""Adapters that change the text encoder too, as diffusers and kohya write them: embeddings and whole pictures against diffusers.

CI has the embeddings of all families and the pictures of those that differ most; `SAFELIGHT_ALL_PARITY=1` has all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safelight import Client
from safelight_server.app.server import serving
from safelight_server.catalog import catalog, config_pbtxt
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.manifest import AdapterRoom
from safelight_server.domain.component import Component
from safelight_server.export.adapters import Adapters, target_names
from safelight_server.export.exporter import export, round_weights, text_encoder_of, token_ids
from safelight_server.export.onnx_file import write_onnx
from safelight_server.export.options import AdapterLayers, ExportFormat, ExportOptions
from safelight_server.export.text_adapters import text_adapters_of, text_room
from safelight_server.runtime import verification
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.torch_runtime import TorchRuntime
from safelight_server.runtime.verification import InputSpec
from safelight_server.sampler import gaussian
from safelight_server.settings import load
from safetensors.torch import save_file

from load_tests.ports import free_port
from tests.training import folders
from tests.training.cells import EVERY

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
ROOM, SEED, STEPS, SIZE = 8, 7, 4, 16
PROMPT, NEGATIVE = "a red potion", "blurry, ugly!"
OF_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OF_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
Layers = Mapping[str, tuple[str, int]]


@dataclass(frozen=True)
class Family:
    """A kind of pipeline.

    Attributes:
        make: a small random one.
        short: of each CLIP text encoder, how kohya's scripts begin the names of its layers.
        original: layers of the denoiser by the names that kohya's scripts give them: of diffusers the first layer that
            stands for it, and how many do.
        asked: what diffusers' pipeline is given beside what all are given.
        format: of the export in CI; None: there is none.
    """

    make: Callable[[], DiffusionPipeline]
    short: Mapping[str, str]
    original: Layers = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    format: ExportFormat | None = None


T5 = {"max_sequence_length": folders.T5_TOKENS}
CLIP_L, CLIP_L_AND_G = {"text_encoder": "lora_te1"}, {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
FAMILIES = {
    "sd": Family(folders.pipeline, {"text_encoder": "lora_te"}),
    "sdxl": Family(folders.sdxl_pipeline, CLIP_L_AND_G, format=ExportFormat.BOTH),
    "flux": Family(
        lambda: folders.flux_pipeline(is_distilled=True),
        CLIP_L,
        {
            "double_blocks_0_txt_attn_qkv": ("transformer_blocks.0.attn.add_{}_proj", 3),
            "double_blocks_0_img_mlp_0": ("transformer_blocks.0.ff.net.0.proj", 1),
            "single_blocks_0_linear2": ("single_transformer_blocks.0.proj_out", 1),
        },
        T5,
        ExportFormat.TORCH,
    ),
    "sd3": Family(
        folders.sd3_pipeline,
        CLIP_L_AND_G,
        {
            "joint_blocks_0_x_block_attn_qkv": ("transformer_blocks.0.attn.to_{}", 3),
            "joint_blocks_0_context_block_mlp_fc1": ("transformer_blocks.0.ff_context.net.0.proj", 1),
            "joint_blocks_1_context_block_adaLN_modulation_1": ("transformer_blocks.1.norm1_context.linear", 1),
        },
        T5,
    ),
}


def denoiser_name(pipeline: Any) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def kohya_layers(family: Family, pipeline: Any) -> Iterator[tuple[str, list[str], int, int]]:
    """Names of kohya's, the layers of diffusers' that stand for each, its inputs and outputs."""
    name = denoiser_name(pipeline)
    network = getattr(pipeline, name)
    layers = family.original or {at.replace(".", "_"): (at, 1) for at in target_names(network, AdapterLayers.ATTENTION)}
    for original, (pattern, count) in layers.items():
        theirs = [pattern.format(part) for part in "qkv"] if count > 1 else [pattern]
        layer = network.get_submodule(theirs[0])
        yield (
            f"lora_unet_{original}",
            [f"{name}.{at}" for at in theirs],
            layer.in_features,
            count * layer.out_features,
        )
    for target in text_room(text_adapters_of(pipeline), ROOM)["targets"]:
        encoder, _, layer = target["name"].partition(".")
        yield (
            f"{family.short[encoder]}_{layer.replace('.', '_')}",
            [target["name"]],
            target["inputs"],
            target["outputs"],
        )


def write_kohya(family: Family, place: Path) -> None:
    """`kohya`: all layers of the text encoders and some of the denoiser's, as sd-scripts writes it by default.

    For Stable Diffusion 3 diffusers does not read kohya's files: it is given the same numbers under its own names.
    """
    pipeline, generator, made, twin = family.make(), torch.Generator().manual_seed(3), {}, {}
    for key, theirs, inputs, outputs in kohya_layers(family, pipeline):
        down = 0.3 * torch.randn(3, inputs, generator=generator)
        up = 0.3 * torch.randn(outputs, 3, generator=generator)
        made |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        if "adaLN" in key:  # of the last block: shift and scale stand the other way round
            up = up.roll(outputs // 2, 0)
        for name, part in zip(theirs, up.chunk(len(theirs)), strict=True):
            twin |= {f"{name}.lora_A.weight": down.clone(), f"{name}.lora_B.weight": part * 2 / 3}
    for folder, tensors in ((place / "kohya", made), (place.parent / "twin", twin)):
        folder.mkdir(parents=True)
        save_file(tensors, folder / "kohya.safetensors")


def write_trained(make: Callable[[], Any], place: Path, networks: Iterable[str], seed: int) -> None:
    """What diffusers saves of adapters that peft has added to these networks, with their configurations."""
    pipeline, generator, given = make(), torch.Generator().manual_seed(seed), {}
    for name in networks:
        network, is_text = getattr(pipeline, name), name.startswith("text_encoder")
        network.add_adapter(
            peft.LoraConfig(r=2, lora_alpha=3, target_modules=OF_TEXT[::2] if is_text else OF_ATTENTION)
        )
        for parameter_name, parameter in network.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
        facts = network.peft_config["default"].to_dict()
        told = {key: sorted(value) if isinstance(value, set) else value for key, value in facts.items()}
        state = peft.get_peft_model_state_dict(network, adapter_name="default")
        given |= {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": told}
    type(pipeline).save_lora_weights(place, **given)


@dataclass
class Written:
    """A pipeline's folder, and three adapters: `kohya`, `both` by diffusers, and `word` of the text encoders alone."""

    name: str
    family: Family
    folder: Path

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    def theirs(self, **scales: float) -> Any:
        """diffusers' pipeline with adapters that diffusers has loaded."""
        pipeline = self.family.make()
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(pipeline, "unet"):
            config = pipeline.scheduler.config
            pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="leading")
        for network in pipeline.components.values():
            if isinstance(network, torch.nn.Module):
                round_weights(network)
        for name in scales:
            is_twin = name == "kohya" and self.name == "sd3"
            pipeline.load_lora_weights(self.folder / "twin" if is_twin else self.adapters / name, adapter_name=name)
        if scales:
            pipeline.set_adapters(list(scales), adapter_weights=list(scales.values()))
        return pipeline


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    torch.set_num_threads(1)
    made = Written(request.param, FAMILIES[request.param], tmp_path_factory.mktemp("text_adapters"))
    make = made.family.make
    pipeline = make()
    pipeline.save_pretrained(made.folder / "pipeline")
    write_kohya(made.family, made.adapters)
    write_trained(make, made.adapters / "both", [denoiser_name(pipeline), *made.family.short], 4)
    write_trained(make, made.adapters / "word", made.family.short, 5)
    return made


@pytest.fixture(scope="module")
def models(written: Written) -> Path:
    """What is exported of it."""
    format = ExportFormat.BOTH if EVERY else written.family.format
    if format is None:
        pytest.skip("not in CI")
    rows = {"max_rows": 4 * MAX_ROWS}
    options = ExportOptions("tiny", licence="CC0-1.0", sizes=((SIZE, SIZE),), format=format, adapter_rank=ROOM, **rows)
    export(written.folder / "pipeline", written.folder / "models", options)
    return written.folder / "models"


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
async def test_whole_pictures_are_those_of_diffusers(written, models, runtime):
    """Through a server, all at once and each alone, on ONNX Runtime bit-equal; and within 1/255 of diffusers' pictures."""
    if runtime == "onnx" and not (models / "repository" / "tiny_denoiser" / "1").is_dir():
        pytest.skip("exported for torch alone")
    settings = load(
        port=free_port(), models_dir=models, adapters_dir=written.adapters, num_instances=1, runtime=runtime
    )
    tolerance = 0 if runtime == "onnx" else 1
    # FLUX is given the guidance scale, and no negative prompt.
    kinds = [kind for kind in KINDS if written.name != "flux" or "negative_prompt" not in kind[1] or len(kind[0]) > 1]
    if written.name == "flux":
        kinds = [(scales, {"guidance_scale": given["guidance_scale"]}) for scales, given in kinds]
    async with serving(settings) as running, Client(running.address) as client:
        assert list(running.catalog.adapters.of("tiny")) == ["both", "kohya", "word"]

        async def ours(adapters: dict[str, float], given: dict[str, Any]) -> np.ndarray:
            drawn = client.generate(PROMPT, seed=SEED, steps=STEPS, adapters=adapters, cache="bypass", **given)
            return np.asarray(await drawn.image(), int)

        together = await asyncio.gather(*(ours(*kind) for kind in kinds))
        for kind, picture in zip(kinds, together, strict=True):
            assert np.abs(await ours(*kind) - picture).max() <= tolerance, kind
    for (scales, given), picture in zip(kinds, together, strict=True):
        expected = drawn_by(written.theirs(**scales), given | written.family.asked)
        assert np.abs(picture - expected).max() <= 1, (scales, given)
        if scales:
            plain = drawn_by(written.theirs(), given | written.family.asked)
            assert np.abs(picture - plain).max() > 8, "the adapters matter"


def drawn_by(pipeline: Any, given: Mapping[str, Any]) -> np.ndarray:
    """diffusers' picture from the server's noise."""
    noise = torch.from_numpy(gaussian(SEED, 0, 0, (pipeline.vae.config.latent_channels, SIZE // 2, SIZE // 2)))[None]
    if hasattr(pipeline, "_pack_latents"):
        noise = pipeline._pack_latents(noise, *noise.shape)
    asked = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS} | given
    return np.asarray(pipeline(PROMPT, latents=noise, **asked).images[0], int)


HALVES = {"float16": 0.01, "bfloat16": 0.05}
"""How far a network's results are from those of float32, relative to the largest."""
BOTH, MAX_ROWS = (Component.TEXT_ENCODER, Component.DENOISER), 4
EXACT = {"timestep": 500.0, "guidance": 4.0}
"""Held exactly by all types, and so are 0.5 and 4000."""


async def test_half_precision_takes_adapters(written, models):
    """Rows with and without adapters of one batch are within the tolerance of each alone, and near those of float32."""
    if not EVERY and written.name != "flux":
        pytest.skip("not in CI")
    pipeline = catalog.load(models, weights="torch").get("")
    found: dict[tuple[Component, str], np.ndarray[Any, Any]] = {}
    for dtype in ("float32", *HALVES):
        options = TorchOptions(device="cpu", num_instances=1, dtype=dtype)
        runtime = TorchRuntime(catalog.load(models, weights="torch"), options)
        await runtime.start()
        try:
            for component in BOTH:
                assert runtime.max_rows("tiny", component) >= MAX_ROWS
                config = config_pbtxt.read(pipeline.torch_folder / "configs" / f"{component}.pbtxt")
                specs = [InputSpec(name, shape, name in config.ids) for name, shape in config.rows.items()]
                feed = verification.example(verification.at_sizes(specs, pipeline)[0], MAX_ROWS)
                # FLUX's network rounds time and guidance to its own type, times 1000: these are not changed by that.
                feed["adapter_weights"] *= 4
                feed |= {name: np.full(MAX_ROWS, value, "f") for name, value in EXACT.items() if name in feed}
                assert [scales.any() for scales in feed["adapter_scales"]] == [True, True, False, True]
                together = await runtime.run(0, "tiny", component, feed)
                for row in range(MAX_ROWS):
                    one = {name: array[row : row + 1] for name, array in feed.items()}
                    alone = await runtime.run(0, "tiny", component, one)
                    for name, wanted in alone.items():
                        off = np.abs(together[name][row] - wanted[0]).max() / np.abs(wanted).max()
                        assert off <= options.tolerance, (dtype, component, name)
                bare = feed | {"adapter_scales": np.zeros_like(feed["adapter_scales"])}
                changes = []
                for name, plain in (await runtime.run(0, "tiny", component, bare)).items():
                    wanted = found.setdefault((component, name), together[name])
                    off, change = (np.abs(together[name] - at).max() / np.abs(wanted).max() for at in (wanted, plain))
                    assert off <= HALVES.get(dtype, 0), (dtype, name)
                    changes.append(change)
                assert max(changes) > 2 * HALVES.get(dtype, 0), "the adapters matter"
        finally:
            await runtime.close()


MIXED = [{}, {"kohya": 1.0}, {"word": 0.7}, {"kohya": -0.5, "both": 1.3}, {}, {"word": 0.25}]
TEXTS = [PROMPT, PROMPT, NEGATIVE, "a castle", "", "the old ship at night"]


def test_prompts_of_a_mixed_batch_have_the_bits_that_they_have_alone_and_are_those_of_peft(written):
    """On ONNX Runtime."""
    pipeline = written.theirs()
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    of_denoiser = Adapters(denoiser, target_names(denoiser, AdapterLayers.BLOCKS))
    of_text = text_adapters_of(pipeline)
    room, place = (
        AdapterRoom.model_validate(of_denoiser.room(ROOM)),
        AdapterRoom.model_validate(text_room(of_text, ROOM)),
    )
    library = AdapterLibrary(written.adapters, {"tiny": room}, text_rooms={"tiny": place})
    rows, names = len(MIXED), ("last_hidden_state", "pooled_output")
    ids = token_ids(pipeline, TEXTS)
    feed = {
        "input_ids": ids.numpy(),
        "adapter_weights": np.zeros((rows, ROOM, place.width), np.float32),
        "adapter_scales": np.zeros((rows, ROOM), np.float32),
    }
    for row, scales in enumerate(MIXED):
        first = 0
        for name, scale in scales.items():
            weights = library.weights("tiny", name, library.of("tiny")[name].sha256)[:, room.width :]
            feed["adapter_weights"][row, first : first + len(weights)] = weights
            feed["adapter_scales"][row, first : first + len(weights)] = scale
            first += len(weights)
    module, file = text_encoder_of(pipeline, of_text).eval(), written.folder / "text_encoder" / "1" / "model.onnx"
    with torch.no_grad():
        write_onnx(module, [{"input_ids": ids[:2], **of_text.examples(ROOM, 2)}], names, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    together = session.run(names, feed)
    for row in range(rows):
        alone = session.run(names, {name: array[row : row + 1] for name, array in feed.items()})
        assert all(np.array_equal(one[row], other[0]) for one, other in zip(together, alone, strict=True)), row
    for row, (text, scales) in enumerate(zip(TEXTS, MIXED, strict=True)):
        found, expected = (together[0][row], together[1][row]), embeddings(written.theirs(**scales), text)
        plain = embeddings(written.theirs(), text)
        for ours, theirs in zip(found, expected, strict=True):
            if theirs is not None:
                assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max()), scales
        if scales:
            changes = [np.abs(one - other).max() for one, other in zip(expected, plain, strict=True) if one is not None]
            assert max(changes) > 1e-2, "the adapters matter"


def embeddings(pipeline: Any, text: str) -> tuple[np.ndarray, np.ndarray | None]:
    """diffusers' embedding of a prompt, and its pooled output; of an empty one SDXL has zeros, and SD no pooled output."""
    with torch.no_grad():
        if isinstance(pipeline, StableDiffusionXLPipeline):
            hidden, _, pooled, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
            hidden, pooled = (at if text else torch.zeros_like(at) for at in (hidden, pooled))
        elif hasattr(pipeline, "unet"):
            hidden, pooled = pipeline.encode_prompt(text, "cpu", 1, False)[0], None
        elif hasattr(pipeline, "text_encoder_3"):
            hidden, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False, **T5)
        else:
            hidden, pooled, _ = pipeline.encode_prompt(text, None, **T5)
    return hidden[0].numpy(), None if pooled is None else pooled[0].numpy()
