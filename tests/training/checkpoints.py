"""Saves a pipeline as a checkpoint in one file, with the names of the original Stable Diffusion, or of SDXL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_checkpoint(pipeline: DiffusionPipeline, file: Path) -> None:
    """Writes all networks to one file."""
    unet, vae, text = (getattr(pipeline, name).state_dict() for name in ("unet", "vae", "text_encoder"))
    layers, levels = pipeline.unet.config.layers_per_block, len(pipeline.vae.config.block_out_channels)
    tensors: dict[str, Tensor] = {}
    tensors |= {f"model.diffusion_model.{unet_name(key, layers)}": tensor for key, tensor in unet.items()}
    tensors |= {f"first_stage_model.{vae_name(key, levels)}": tensor for key, tensor in vae.items()}
    is_sdxl = isinstance(pipeline, StableDiffusionXLPipeline)
    prefix = ("conditioner.embedders.0.transformer." if is_sdxl else "cond_stage_model.transformer.") + (
        "" if any(key.startswith("text_model.") for key in text) else "text_model."
    )
    tensors |= {f"{prefix}{key}": tensor for key, tensor in text.items()}
    if is_sdxl:
        tensors |= open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)


def unet_name(key: str, layers: int) -> str:
    """The name of a weight of the denoiser; `layers` are those of a block on the way down."""
    for ours, theirs in WHOLE.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    if mid := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        part, number, rest = mid[1], int(mid[2]), mid[3]
        return f"middle_block.{1 if part == 'attentions' else 2 * number}.{resnet_name(rest) if part == 'resnets' else rest}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key)
    assert found, key
    side, block, part, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first = 1 if side == "down" else 0
    place = f"{'input' if side == 'down' else 'output'}_blocks.{block * (layers + 1) + first + number}"
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.2.{rest}"
    return f"{place}.0.{resnet_name(rest)}" if part == "resnets" else f"{place}.1.{rest}"


def resnet_name(rest: str) -> str:
    """The name of a weight within a residual block."""
    layer, _, kind = rest.rpartition(".")
    return f"{RESNET[layer]}.{kind}"


def vae_name(key: str, levels: int) -> str:
    """The name of a weight of the autoencoder."""
    name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda at: f"mid.block_{int(at[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        for ours, theirs in ATTENTION.items():
            name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        return name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda at: f"up.{levels - 1 - int(at[1])}.block", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda at: f"up.{levels - 1 - int(at[1])}.upsample", name)


OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip(text: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder with a projection by the names of open_clip, which has one matrix for q, k and v."""
    tensors = {prefix + theirs: text[ours] for ours, theirs in OPEN_CLIP.items()}
    tensors[f"{prefix}text_projection"] = text["text_projection.weight"].T
    layers = {found[1] for key in text if (found := re.match(r"text_model\.encoder\.layers\.(\d+)\.", key))}
    for layer in layers:
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for our_part, their_part in OPEN_CLIP_LAYER.items():
                tensors[f"{theirs}{their_part}.{kind}"] = text[f"{ours}{our_part}.{kind}"]
            parts = [text[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
    return tensors
