"""Names and forms in files of adapters for FLUX and Stable Diffusion 3: what is read is what diffusers reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from safelight_server.catalog.adapter_files import parse
from safelight_server.catalog.adapter_names import plain_name
from safetensors.torch import save
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")
State = dict[str, Tensor]
INNER = 3072
"""The width of FLUX.1, which diffusers' reader counts on."""
KOHYA, AUTHORS = ("lora_down", "lora_up"), ("lora_A", "lora_B")


def matrices(name: str, inputs: int, outputs: int, parts: tuple[str, str] = KOHYA, alpha: Any = None) -> State:
    generator = torch.Generator().manual_seed(len(name))
    down, up = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
    found = {f"{name}.{parts[0]}.weight": down, f"{name}.{parts[1]}.weight": up}
    return found if alpha is None else {**found, f"{name}.alpha": torch.tensor(alpha)}


def split_qkv(name: str) -> State:
    """Three adapters of rank 2 that kohya's scripts save as one."""
    up = torch.zeros(3 * 8, 6)
    for part in range(3):
        up[8 * part : 8 * part + 8, 2 * part : 2 * part + 2] = torch.randn(8, 2)
    return {
        f"{name}.lora_down.weight": torch.randn(6, 8),
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(3.0, dtype=torch.bfloat16),
    }


TE1 = "lora_te1_text_model_encoder_layers_1"
COMFY_CLIP = "text_encoders.clip_l.transformer.text_model.encoder.layers.1"
COMFY_T5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
FLUX: Mapping[str, State] = {
    "kohya": {
        **matrices("lora_unet_double_blocks_0_img_attn_qkv", 8, 24, alpha=1.0),
        **matrices("lora_unet_double_blocks_1_txt_mod_lin", 8, 48, alpha=3.0),
        **matrices("lora_unet_single_blocks_2_linear1", INNER, 7 * INNER, alpha=1.0),
        **matrices("lora_unet_single_blocks_2_linear2", 40, 8, alpha=4.0),
        **matrices(f"{TE1}_self_attn_q_proj", 8, 8, alpha=1.0),
        **matrices(f"{TE1}_self_attn_out_proj", 8, 8, alpha=2.0),
        **matrices(f"{TE1}_mlp_fc2", 32, 8, alpha=4.0),
    },
    "kohya's split_qkv": split_qkv("lora_unet_double_blocks_0_txt_attn_qkv"),
    "ComfyUI": {
        **matrices("diffusion_model.double_blocks.0.img_attn.proj", 8, 8),
        "diffusion_model.double_blocks.0.img_attn.proj.diff_b": torch.zeros(8),
        **matrices(f"{COMFY_CLIP}.mlp.fc1", 8, 32),
        **{key: 0 * tensor for key, tensor in matrices(COMFY_T5, 8, 8).items()},
    },
    "X-Labs": {
        **matrices("double_blocks.3.processor.qkv_lora1", 8, 24, ("down", "up")),
        **matrices("double_blocks.3.processor.qkv_lora2", 8, 24, ("down", "up")),
        **matrices("double_blocks.3.processor.proj_lora1", 8, 8, ("down", "up")),
        **matrices("double_blocks.3.processor.proj_lora2", 8, 8, ("down", "up")),
        **matrices("single_blocks.4.processor.qkv_lora", 8, 24, ("down", "up")),
        **matrices("single_blocks.4.processor.proj_lora", 40, 8, ("down", "up")),
    },
    "lora_transformer": {
        **matrices("lora_transformer_transformer_blocks_0_attn_to_add_out", 8, 8, alpha=1.0),
        **matrices("lora_transformer_single_transformer_blocks_7_attn_to_k", 8, 8, alpha=2.0),
        **matrices(f"{TE1}_self_attn_out_proj", 8, 8, alpha=1.0),
    },
    "diffusers' names, kohya's halves": matrices("transformer.transformer_blocks.0.attn.to_q", 8, 8),
}


def ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = parse(save({key: tensor.contiguous() for key, tensor in state.items()}))
    return {name: added(*map(torch.from_numpy, (layer.up, layer.down))) for name, layer in layers.items()}


def added(up: Tensor, down: Tensor) -> Tensor:
    """What a layer adds for a few inputs."""
    return up.float() @ (down.float() @ torch.randn(down.shape[1], 4, generator=torch.Generator().manual_seed(6)))


def theirs(state: State) -> dict[str, Tensor]:
    read = FluxLoraLoaderMixin.lora_state_dict(dict(state))
    of_text = {key: tensor for key, tensor in read.items() if key.startswith("text_encoder.")}
    read = {key: read[key] for key in read.keys() - of_text.keys()}
    read |= convert_state_dict_to_peft(convert_state_dict_to_diffusers(of_text)) if of_text else {}
    ends = ".lora_A.weight", ".lora_B.weight"
    names = {key.removesuffix(ends[0]) for key in read if key.endswith(ends[0])}
    assert len(read) == 2 * len(names)
    return {
        plain_name(name.removeprefix("transformer.")): added(read[name + ends[1]], read[name + ends[0]])
        for name in names
    }


@pytest.mark.parametrize("kind", FLUX)
def test_files_for_flux_are_read_as_diffusers_reads_them(kind):
    found, expected = ours(FLUX[kind]), theirs(FLUX[kind])
    assert found.keys() == expected.keys()
    for name, product in found.items():
        assert torch.allclose(product, expected[name], rtol=1e-4, atol=1e-4), name


BLOCK = {
    "attn.qkv": (8, 24),
    "attn.proj": (8, 8),
    "mlp.fc1": (8, 32),
    "mlp.fc2": (32, 8),
    "adaLN_modulation.1": (8, 48),
}
DUAL = BLOCK | {"attn2.qkv": (8, 24), "attn2.proj": (8, 8), "adaLN_modulation.1": (8, 72)}
LAST = {"attn.qkv": (8, 24), "adaLN_modulation.1": (8, 16)}
JOINT = {"0.x_block": DUAL, "0.context_block": BLOCK, "1.x_block": BLOCK, "1.context_block": LAST}
OTHERS = """pos_embed x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias
t_embedder.mlp.2.weight t_embedder.mlp.2.bias context_embedder.weight context_embedder.bias y_embedder.mlp.0.weight
y_embedder.mlp.0.bias y_embedder.mlp.2.weight y_embedder.mlp.2.bias final_layer.linear.weight final_layer.linear.bias
final_layer.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias"""


@pytest.mark.parametrize(("prefix", "parts"), [("lora_unet_", KOHYA), ("diffusion_model.", AUTHORS)])
def test_files_for_stable_diffusion_3_change_what_diffusers_makes_of_the_authors_layers(prefix, parts):
    """The changes of weights are put into a checkpoint of the authors, which diffusers converts."""
    state, checkpoint = {}, {name: torch.zeros(8, 8) for name in OTHERS.split()}
    for block, layers in JOINT.items():
        for layer, (inputs, outputs) in layers.items():
            name = f"joint_blocks.{block}.{layer}"
            made = matrices(prefix + (plain_name(name) if prefix == "lora_unet_" else name), inputs, outputs, parts)
            down, up = made.values()
            state |= made
            checkpoint |= {f"{name}.weight": up @ down, f"{name}.bias": torch.zeros(outputs)}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    found = ours(state)
    changed = {
        plain_name(name.removesuffix(".weight")): added(tensor, torch.eye(tensor.shape[1]))
        for name, tensor in converted.items()
        if name.startswith("transformer_blocks") and name.endswith(".weight")
    }
    assert found.keys() == changed.keys()
    for name, product in found.items():
        assert torch.allclose(product, changed[name], atol=1e-4), name
