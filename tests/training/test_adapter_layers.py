"""Adapters of every kind of layer, as kohya's scripts write them: the exported denoisers against diffusers' own reader."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safelight import Client
from safelight_server.app.server import serving
from safelight_server.catalog import adapter_files, catalog
from safelight_server.domain.component import Component
from safelight_server.export.adapters import target_names
from safelight_server.export.exporter import export, round_weights
from safelight_server.export.options import AdapterLayers, ExportOptions
from safelight_server.sampler import gaussian
from safelight_server.settings import load
from safetensors.torch import save_file
from torch import nn

from load_tests.ports import free_port
from tests.training import folders

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
RANK, SIZE = 2, 8
KINDS = {
    "attention": r"to_[qkv]|to_out\.0",
    "feed-forward": r"ff\.net\.0\.proj|ff\.net\.2",
    "projections": r"proj_in|proj_out",
    "ResNets": r"conv1|conv2",
    "shortcuts": r"conv_shortcut",
    "timesteps in ResNets": r"time_emb_proj",
    "timesteps": r"time_embedding\.linear_[12]",
    "sizes": r"add_embedding\.linear_[12]",
    "downsamplers": r"downsamplers\.0\.conv",
    "upsamplers": r"upsamplers\.0\.conv",
    "ends": r"conv_in|conv_out",
    "all": r".+",
}
"""Layers of a UNet, by what their names end with."""


def kind_of(layer: str) -> str:
    """The first of `KINDS` that a layer belongs to."""
    return next(kind for kind, pattern in KINDS.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """As `folders.sdxl_pipeline`, with two ResNets in each level, as all UNets with original names have."""
    whole = folders.sdxl_pipeline()
    torch.manual_seed(5)
    unet = UNet2DConditionModel.from_config(whole.unet.config, layers_per_block=2).eval()
    return StableDiffusionXLPipeline(**whole.components | {"unet": unet}, add_watermarker=False)


PIPELINES = {"sd15": folders.pipeline, "sdxl": sdxl_pipeline}


def original_names() -> dict[str, str]:
    """Beginnings of the names of diffusers, and of the original UNet's, for two levels of which the second attends.

    Written down as the original UNet builds itself: its blocks are counted through all levels.
    """
    return {
        "conv_in": "input_blocks_0_0",
        "down_blocks.0.resnets.0": "input_blocks_1_0",
        "down_blocks.0.resnets.1": "input_blocks_2_0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.resnets.0": "input_blocks_4_0",
        "down_blocks.1.attentions.0": "input_blocks_4_1",
        "down_blocks.1.resnets.1": "input_blocks_5_0",
        "down_blocks.1.attentions.1": "input_blocks_5_1",
        "mid_block.resnets.0": "middle_block_0",
        "mid_block.attentions.0": "middle_block_1",
        "mid_block.resnets.1": "middle_block_2",
        "up_blocks.0.resnets.0": "output_blocks_0_0",
        "up_blocks.0.attentions.0": "output_blocks_0_1",
        "up_blocks.0.resnets.1": "output_blocks_1_0",
        "up_blocks.0.attentions.1": "output_blocks_1_1",
        "up_blocks.0.resnets.2": "output_blocks_2_0",
        "up_blocks.0.attentions.2": "output_blocks_2_1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.resnets.0": "output_blocks_3_0",
        "up_blocks.1.resnets.1": "output_blocks_4_0",
        "up_blocks.1.resnets.2": "output_blocks_5_0",
        "conv_out": "out_2",
        "time_embedding.linear_1": "time_embed_0",
        "time_embedding.linear_2": "time_embed_2",
        "add_embedding.linear_1": "label_emb_0_0",
        "add_embedding.linear_2": "label_emb_0_2",
    }


IN_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def kohya_key(base: str, layer: str) -> str:
    """What kohya's scripts call a layer: diffusers' name for Stable Diffusion 1.5, the original one for SDXL."""
    if base == "sd15":
        return f"lora_unet_{layer.replace('.', '_')}"
    [(begin, original)] = [pair for pair in original_names().items() if f"{layer}.".startswith(f"{pair[0]}.")]
    rest = layer.removeprefix(begin).lstrip(".")
    rest = IN_RESNET.get(rest, rest).replace(".", "_")
    return f"lora_unet_{original}_{rest}".rstrip("_")


def write_kohya(base: str, unet: nn.Module, kind: str, file: Path) -> None:
    """Writes a random adapter of the layers of a kind, with an alpha of its own for each."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for layer in target_names(unet, AdapterLayers.ALL):
        if kind not in ("all", kind_of(layer)):
            continue
        module, key = unet.get_submodule(layer), kohya_key(base, layer)
        outputs, *rest = module.weight.shape
        ends = [1] * len(rest[1:])
        tensors[f"{key}.lora_down.weight"] = 0.4 * torch.randn(RANK, *rest, generator=generator)
        tensors[f"{key}.lora_up.weight"] = 0.4 * torch.randn(outputs, RANK, *ends, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(1.0 + len(tensors) % 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


@pytest.fixture(scope="module", params=PIPELINES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A pipeline's folder, an adapter of each kind of layer in `adapters/` beside it, and its export in `models/`."""
    torch.set_num_threads(1)
    name, place = request.param, tmp_path_factory.mktemp(request.param)
    pipeline = PIPELINES[name]()
    pipeline.save_pretrained(place / "pipeline")
    folders.spare_encoder(place / "pipeline")
    present = {kind_of(layer) for layer in target_names(pipeline.unet, AdapterLayers.ALL)}
    assert present == KINDS.keys() - {"all"} - ({"sizes"} if name == "sd15" else set())
    for kind in [*present, "all"]:
        write_kohya(name, pipeline.unet, kind, place / "adapters" / kind.replace(" ", "-") / "adapter.safetensors")
    room = {"adapter_rank": RANK + 1, "adapter_layers": AdapterLayers.ALL}
    options = ExportOptions("tiny", licence="CC0-1.0", sizes=((SIZE, SIZE),), **room)
    export(place / "pipeline", place / "models", options)
    return name, place


def loaded(place: Path) -> DiffusionPipeline:
    """diffusers' pipeline with the weights that are exported."""
    pipeline = DiffusionPipeline.from_pretrained(place / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            round_weights(network)
    return pipeline


def inputs_of(name: str, unet: UNet2DConditionModel, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    made = {
        "sample": torch.randn(rows, 4, 4, 4, generator=generator),
        "timestep": 999 * torch.rand(rows, generator=generator),
        "encoder_hidden_states": torch.randn(rows, 77, unet.config.cross_attention_dim, generator=generator),
    }
    if name == "sdxl":
        made["text_embeds"] = torch.randn(rows, 20, generator=generator)
        made["time_ids"] = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * rows)
    return made


def test_every_kind_of_layer_is_changed_as_diffusers_changes_it(base):
    """In one batch, a row for each kind, and rows without adapters; each row has the bits that it has alone."""
    name, place = base
    pipeline = loaded(place)
    kinds = ["", *sorted(folder.name for folder in (place / "adapters").iterdir()), ""]
    given = inputs_of(name, pipeline.unet, len(kinds))
    expected = []
    for row, kind in enumerate(kinds):
        if kind:
            pipeline.load_lora_weights(place / "adapters" / kind, adapter_name="one", weight_name="adapter.safetensors")
        one = {key: tensor[row : row + 1] for key, tensor in given.items()}
        of_size = {key: one.pop(key) for key in ("text_embeds", "time_ids") if key in one}
        with torch.no_grad():
            found = pipeline.unet(**one, added_cond_kwargs=of_size, return_dict=False)[0]
        expected.append(found.numpy())
        if kind:
            pipeline.unload_lora_weights()

    served = catalog.load(place / "models").get("tiny")
    room = served.manifest.adapters
    weights = np.zeros((len(kinds), room.max_rank, room.width), np.float32)
    for row, kind in enumerate(kinds):
        if kind:
            data = (place / "adapters" / kind / "adapter.safetensors").read_bytes()
            weights[row, :RANK] = adapter_files.packed(adapter_files.parse(data), room)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(served.files[Component.DENOISER], options)
    feed = {key: tensor.numpy() for key, tensor in given.items()}
    feed |= {"adapter_weights": weights, "adapter_scales": np.ones(weights.shape[:2], np.float32)}
    [together] = session.run(None, feed)
    [bare] = session.run(None, feed | {"adapter_scales": np.zeros(weights.shape[:2], np.float32)})
    for row, kind in enumerate(kinds):
        assert np.abs(together[row] - expected[row][0]).max() <= 2e-5, kind
        assert (np.abs(together[row] - bare[row]).max() > 1e-2) == bool(kind), f"{kind}: the adapters matter"
        [alone] = session.run(None, {key: array[row : row + 1] for key, array in feed.items()})
        assert np.array_equal(together[row], alone[0]), kind


PROMPT, SEED, STEPS, GUIDANCE = "a red potion", 7, 4, 5.0


async def test_whole_pictures_with_all_layers_changed_are_those_of_diffusers(base):
    """From the exported folder through a server, within 1/255."""
    _, place = base
    settings = load(port=free_port(), models_dir=place / "models", adapters_dir=place / "adapters", num_instances=1)
    async with serving(settings) as running, Client(running.address) as client:

        async def ours(**scales: float) -> np.ndarray:
            drawn = client.generate(PROMPT, seed=SEED, steps=STEPS, guidance_scale=GUIDANCE, adapters=scales)
            return np.asarray(await drawn.image(), int)

        plain, changed = await ours(), await ours(all=0.5)
    pipeline = loaded(place)
    given = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    noise = torch.from_numpy(gaussian(SEED, 0, 0, (4, SIZE // 2, SIZE // 2)))[None]
    pipeline.load_lora_weights(place / "adapters" / "all", adapter_name="all", weight_name="adapter.safetensors")
    pipeline.set_adapters(["all"], adapter_weights=[0.5])
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    expected = np.asarray(pipeline(PROMPT, latents=noise, **given).images[0], int)
    assert np.abs(changed - expected).max() <= 1
    assert np.abs(changed - plain).max() > 8, "the adapters matter"
