"""The layers of FLUX, Stable Diffusion 3 and Z-Image as their authors name them, as kohya's and others' files do. Pure.

diffusers has several layers where the authors have one: queries, keys and values
side by side, and in FLUX's single blocks the feed-forward's input beside them. An
adapter of such a layer is one of each of these: the same matrix A, and of B the part
that makes the layer's outputs. diffusers' `lora_conversion_utils` does the same.
"""

from __future__ import annotations

import re

_QKV = ("attn_to_q", "attn_to_k", "attn_to_v")
_ADDED_QKV = ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj")
_DOUBLE = {
    "img_attn_qkv": _QKV,
    "txt_attn_qkv": _ADDED_QKV,
    "img_attn_proj": ("attn_to_out_0",),
    "txt_attn_proj": ("attn_to_add_out",),
    "img_mlp_0": ("ff_net_0_proj",),
    "img_mlp_2": ("ff_net_2",),
    "txt_mlp_0": ("ff_context_net_0_proj",),
    "txt_mlp_2": ("ff_context_net_2",),
    "img_mod_lin": ("norm1_linear",),
    "txt_mod_lin": ("norm1_context_linear",),
}
_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "qkv": _QKV,  # of linear1, as X-Labs has it (`adapter_names.X_LABS`)
    "linear2": ("proj_out",),
    "modulation_lin": ("norm_linear",),
}
_CONTEXT_MODULATION = "context_block_adaLN_modulation_1"
_JOINT = {
    "x_block_attn_qkv": _QKV,
    "x_block_attn_proj": ("attn_to_out_0",),
    "x_block_attn2_qkv": ("attn2_to_q", "attn2_to_k", "attn2_to_v"),
    "x_block_attn2_proj": ("attn2_to_out_0",),
    "x_block_mlp_fc1": ("ff_net_0_proj",),
    "x_block_mlp_fc2": ("ff_net_2",),
    "x_block_adaLN_modulation_1": ("norm1_linear",),
    "context_block_attn_qkv": _ADDED_QKV,
    "context_block_attn_proj": ("attn_to_add_out",),
    "context_block_mlp_fc1": ("ff_context_net_0_proj",),
    "context_block_mlp_fc2": ("ff_context_net_2",),
    _CONTEXT_MODULATION: ("norm1_context_linear",),
}
_Z_IMAGE = {
    "attention_qkv": ("attention_to_q", "attention_to_k", "attention_to_v"),
    "attention_out": ("attention_to_out_0",),
}
_BLOCKS = (
    (re.compile(r"double_blocks_(?P<number>\d+)_(?P<layer>\w+)"), "transformer_blocks_", _DOUBLE),
    (re.compile(r"single_blocks_(?P<number>\d+)_(?P<layer>\w+)"), "single_transformer_blocks_", _SINGLE),
    (re.compile(r"joint_blocks_(?P<number>\d+)_(?P<layer>\w+)"), "transformer_blocks_", _JOINT),
    (re.compile(r"layers_(?P<number>\d+)_(?P<layer>\w+)"), "layers_", _Z_IMAGE),
    (re.compile(r"noise_refiner_(?P<number>\d+)_(?P<layer>\w+)"), "noise_refiner_", _Z_IMAGE),
    (re.compile(r"context_refiner_(?P<number>\d+)_(?P<layer>\w+)"), "context_refiner_", _Z_IMAGE),
)


def diffusers_layers(name: str, inputs: int, outputs: int) -> list[tuple[str, slice | list[int]]]:
    """The layers of diffusers that stand for one, each with its part of the outputs; a name of diffusers for itself.

    Args:
        name: without dots, as `adapters.plain_name` gives it.
    """
    for pattern, place, layers in _BLOCKS:
        found = pattern.fullmatch(name)
        if found is not None and found["layer"] in layers:
            names = layers[found["layer"]]
            if found["layer"] == _CONTEXT_MODULATION and outputs == 2 * inputs:
                # The last block of Stable Diffusion 3 has shift and scale, diffusers scale and shift.
                return [(f"{place}{found['number']}_{names[0]}", [*range(inputs, outputs), *range(inputs)])]
            # Queries, keys and values are as wide as the input where something else stands behind them.
            width = inputs if len(names) > len(_QKV) else outputs // len(names)
            ends = [width * (at + 1) for at in range(len(names) - 1)] + [outputs]
            parts = [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]
            return [(f"{place}{found['number']}_{at}", part) for at, part in zip(names, parts, strict=True)]
    return [(name, slice(None))]
