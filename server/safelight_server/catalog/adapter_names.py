"""Names of a UNet's layers in the files of adapters, and what diffusers calls the same layers.

kohya's scripts write adapters of SDXL with the names of the original UNet
(`input_blocks_4_1_proj_in`), early versions of diffusers wrote those of the
attention's processors, and X-Labs those of its own for FLUX. What other tools write are diffusers' own names.
"""

from __future__ import annotations

import re

BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<block>[0-9]{1,2})_(?P<part>[0-2])_(?P<rest>.+)")
MIDDLE = re.compile(r"middle_block_(?P<part>[0-2])_(?P<rest>.+)")
BLOCKS_PER_LEVEL = 3
"""Of the original UNet: on the way down two ResNets and a downsampler, on the way up three ResNets."""
RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
"""What stands before and after the levels, and beside them."""
X_LABS_KEY = re.compile(
    r"(?P<block>.*(double|single)_blocks\.[0-9]+)\.processor\.(?P<part>(qkv|proj)_lora[12]?)(?P<end>\.(down|up)\.weight)"
)
X_LABS = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "qkv",
    "proj_lora": "linear2",
}
"""What X-Labs' trainer for FLUX changes, and the layers of FLUX's authors; `qkv` is a part of `linear1`."""
EARLY_TEXT = re.compile(r"\.to_(q|k|v|out)$")
"""How early versions of diffusers named the attention's layers of a text encoder, as if it were a UNet."""
OTHER_KINDS = {
    ".lora_mid.": "a CP decomposition (LoCon with use_cp or use_tucker)",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".diff_b": "an adapter that changes biases",
    ".bias": "an adapter that changes biases",
    "bundle_emb": "an embedding (textual inversion) beside the adapter",
}
"""Adapters that are no plain LoRA, by what is in their keys; for messages."""


def plain_name(layer: str) -> str:
    """The name of a layer without its dots, as kohya's scripts write it."""
    return layer.replace(".", "_")


def diffusers_name(layer: str) -> str:
    """What diffusers calls a layer of a UNet, but for its dots; a name that is not known stays as it is."""
    plain = plain_name(layer)
    if plain in ENDS:
        return ENDS[plain]
    if (found := MIDDLE.fullmatch(plain)) is not None:
        place = ("resnets_0", "attentions_0", "resnets_1")[int(found["part"])]
        return f"mid_block_{place}_{RESNET.get(found['rest'], found['rest'])}"
    if (found := BLOCK.fullmatch(plain)) is not None:
        return _in_level(found["side"], int(found["block"]), int(found["part"]), found["rest"])
    layer = layer.replace(".processor.", ".")
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def text_layer_name(layer: str) -> str:
    """What transformers calls a layer of CLIP's text encoder."""
    return EARLY_TEXT.sub(r".\1_proj", layer)


def plain_key(key: str) -> str:
    """A key of X-Labs' as one of FLUX's authors; any other stays as it is."""
    if (found := X_LABS_KEY.fullmatch(key)) is None:
        return key
    return f"{found['block']}.{X_LABS[found['part']]}.lora{found['end']}"


def _in_level(side: str, block: int, part: int, rest: str) -> str:
    level, number = divmod(block - 1 if side == "input" else block, BLOCKS_PER_LEVEL)
    blocks = "down_blocks" if side == "input" else "up_blocks"
    if rest == "op":
        return f"{blocks}_{level}_downsamplers_0_conv"
    if rest == "conv":  # behind the ResNet, or behind the attention of a level that has some
        return f"{blocks}_{level}_upsamplers_0_conv"
    place = ("resnets", "attentions", "upsamplers")[part]
    return f"{blocks}_{level}_{place}_{number}_{RESNET.get(rest, rest)}"
