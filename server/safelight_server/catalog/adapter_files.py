"""Reads the file of an adapter (LoRA, Hu et al. 2021), as peft, diffusers, kohya's scripts and others write it.

A key that is not understood is never skipped: the adapter is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from safelight_server.catalog import original_names, safetensors
from safelight_server.catalog.adapter_alphas import AlphaError, Alphas
from safelight_server.catalog.adapter_names import (
    OTHER_KINDS,
    diffusers_name,
    plain_key,
    plain_name,
    text_layer_name,
)
from safelight_server.catalog.manifest import AdapterRoom
from safelight_server.catalog.safetensors import SafetensorsError
from safelight_server.domain.tensors import FloatArray

MAX_KEY_CHARS = 256  # of the name of a tensor; those that are known have at most half as many
PART = re.compile(
    r"(?P<layer>.+?)(\.lora_(?P<half>[AB])(\.default)?|(\.lora[._]|_lora\.|\.lora_linear_layer\.)(?P<side>down|up))\.weight"
)
SIDES = {"A": "down", "B": "up"}
PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_")
"""What stands before the name of a denoiser's layer: peft's, diffusers', that of the models' authors, kohya's."""
DENOISERS = ("unet.", "transformer.")
"""What stands before the keys of a denoiser in the metadata of diffusers' files."""
TEXT_KEY = re.compile(
    r"(?:text_encoder(?:_(?P<number>[23]))?\.|lora_te(?P<kohya>[123])?_|base_model\.model\.(?=text_model\.|encoder\.layers\.)"
    r"|text_encoders\.(?P<comfy>clip_l|clip_g|t5xxl)\.transformer\.)(?:text_model[._])?"
)
"""What stands before the name of a text encoder's layer: diffusers', kohya's, peft's, ComfyUI's. `text_model.` is there
or not."""
COMFY_NUMBERS = {"clip_l": "1", "clip_g": "2", "t5xxl": "3"}
TEXT_ENCODER = "text_encoder"
WHOLE = (".diff", ".diff_b")
"""How keys end of what is added to a weight or a bias as a whole. Some files have zeros there, which add nothing."""


class AdapterFileError(Exception):
    """An adapter cannot be used; the message says why, and begins with what is wrong."""


@dataclass(frozen=True, slots=True)
class LowRankLayer:
    """What an adapter adds to a linear layer or to a convolution: up · down.

    Attributes:
        down: (r, edge * edge * inputs) float32, of a convolution the inputs of each place of its kernel, line by line.
        up: (outputs, r) float32, times alpha / r.
        edge: of the kernel; 1 for a linear layer too.
    """

    down: FloatArray
    up: FloatArray
    edge: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rank, inputs, outputs and the kernel's edge."""
        rank, numbers = self.down.shape
        return rank, numbers // self.edge**2, len(self.up), self.edge


def is_of_text(layer: str) -> bool:
    """Whether a layer is one of a text encoder, by its name or its `plain_name`."""
    return layer.startswith(TEXT_ENCODER)


def parse(data: bytes, config: bytes = b"") -> dict[str, LowRankLayer]:
    """The layers of an adapter's file, by `plain_name`.

    Args:
        config: peft's adapter_config.json, where there is one.

    Raises:
        AdapterFileError: it cannot be read, or has something that is not understood.
    """
    try:
        tensors, metadata = safetensors.parse(data)
        settings = json.loads(config or metadata.get("lora_adapter_metadata", "{}"))
        if not isinstance(settings, dict):
            raise ValueError
    except SafetensorsError as error:
        raise AdapterFileError(str(error)) from None
    except (ValueError, TypeError, RecursionError):
        raise AdapterFileError("has a configuration that is no JSON object") from None
    halves: dict[str, dict[str, FloatArray]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if len(key) > MAX_KEY_CHARS:
            raise AdapterFileError(f"has a key of {len(key)} characters, which is not understood")
        if key.endswith(".alpha") and tensor.size == 1:
            if (layer := _layer(key.removesuffix(".alpha"))) in alphas:
                raise AdapterFileError(f"has {key} and the same alpha under another name")
            alphas[layer] = float(tensor.reshape(()))
            continue
        if key.endswith(WHOLE) and not tensor.any():
            continue
        part = PART.fullmatch(plain_key(key))
        if part is None or tensor.ndim not in (2, 4):
            kind = next((f": it is of {kind}" for mark, kind in OTHER_KINDS.items() if mark in key), "")
            raise AdapterFileError(f"has {key} {list(tensor.shape)}, which is not understood{kind}")
        if not np.isfinite(tensor).all():
            raise AdapterFileError(f"has numbers in {key} that are not finite")
        half, side = halves.setdefault(_layer(part["layer"]), {}), part["side"] or SIDES[part["half"]]
        if side in half:
            raise AdapterFileError(f"has {key} and the same matrix under another name")
        half[side] = tensor
    if not halves:
        raise AdapterFileError("has no layers")
    if len(halves) > len({plain_name(layer) for layer in halves}):
        raise AdapterFileError("has a layer under two names")
    networks = {_network(layer) for layer in halves}
    try:
        of_networks = {at: Alphas(settings if config else _saved_config(settings, at)) for at in networks}
    except AlphaError as error:
        raise AdapterFileError(str(error)) from None
    made = {}
    for layer, half in halves.items():
        made[plain_name(layer)] = _low_rank(layer, half, alphas.get(layer), of_networks[_network(layer)])
    made = _as_in_diffusers(made)
    # Layers of zeros change nothing in any model: files have some for T5, which then need no room.
    return {name: layer for name, layer in made.items() if layer.up.any() and layer.down.any()} or made


def _low_rank(layer: str, halves: Mapping[str, FloatArray], alpha: float | None, alphas: Alphas) -> LowRankLayer:
    if halves.keys() != {"down", "up"} or not _go_together(halves["down"], halves["up"]):
        raise AdapterFileError(f"has matrices of {layer} that do not go together")
    down, up = halves["down"], halves["up"]
    rank, edge = len(down), 1 if down.ndim == 2 else down.shape[3]
    if alpha is None:
        alpha = alphas.of(_trained_names(layer))
    scaling = 1.0 if alpha is None else alpha / (math.sqrt(rank) if alphas.use_rslora else rank)
    with np.errstate(over="ignore", invalid="ignore"):
        up = up.reshape(-1, rank) * np.float32(scaling)
    if not np.isfinite(up).all():
        raise AdapterFileError(f"has an alpha of {layer} with which its numbers are not finite")
    if down.ndim == 4:
        down = down.transpose(0, 2, 3, 1)
    return LowRankLayer(down.reshape(rank, -1), up, edge)


def _go_together(down: FloatArray, up: FloatArray) -> bool:
    """Whether these are (r, inputs) and (outputs, r), or the kernels of two convolutions, the second one of 1 x 1.

    Either may be a matrix where the other is a kernel: files mix them, as a kernel of 1 x 1 is a matrix too.
    """
    return bool(down.size) and up.shape[1:] in ((len(down),), (len(down), 1, 1)) and down.shape[2:3] == down.shape[3:]


def _as_in_diffusers(layers: Mapping[str, LowRankLayer]) -> dict[str, LowRankLayer]:
    """The layers that diffusers has in place of those of a model's authors (`original_names`)."""
    made: dict[str, LowRankLayer] = {}
    for name, layer in layers.items():
        _, inputs, outputs, _ = layer.shape
        for at, part in original_names.diffusers_layers(name, inputs, outputs):
            if at in made:
                raise AdapterFileError(f"changes {at} twice, under two names")
            made[at] = layer if part == slice(None) else _of_outputs(layer, part)
    return made


def _of_outputs(layer: LowRankLayer, outputs: slice | list[int]) -> LowRankLayer:
    """A layer of some of the outputs, without the ranks that add nothing to them.

    kohya's `split_qkv` writes three adapters as one: the ranks of all, of which each changes its own outputs.
    """
    up = layer.up[outputs]
    acting = up.any(axis=0)
    return replace(layer, down=layer.down[acting], up=up[:, acting]) if acting.any() else replace(layer, up=up)


def _layer(key: str) -> str:
    """The name of a layer in the denoiser, or in the pipeline: text_encoder.text_model.… or text_encoder_2.…"""
    if (of_text := TEXT_KEY.match(key)) is not None:
        number = of_text["number"] or of_text["kohya"] or COMFY_NUMBERS.get(of_text["comfy"], "1")
        name = text_layer_name(key[of_text.end() :])
        return f"{TEXT_ENCODER}{'' if number == '1' else f'_{number}'}.text_model.{name}"
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return diffusers_name(key)


def _trained_names(layer: str) -> list[str]:
    """What a layer may have been called in the network that was trained: a text encoder has `text_model`, or not."""
    if not is_of_text(layer):
        return [layer]
    _, _, name = layer.partition(".")
    return [name, name.removeprefix("text_model.")]


def _network(layer: str) -> str:
    """The text encoder that has a layer; "" for the denoiser."""
    return layer.partition(".")[0] if is_of_text(layer) else ""


def _saved_config(saved: Mapping[str, Any], network: str) -> dict[str, Any]:
    """peft's configuration of a network, of those that diffusers puts into the file itself."""
    prefixes = (f"{network}.",) if network else DENOISERS
    return {key.partition(".")[2]: value for key, value in saved.items() if key.startswith(prefixes)}


def packed(layers: Mapping[str, LowRankLayer], room: AdapterRoom) -> FloatArray:
    """The weights of an adapter as rows are given them: (r, Q) float32 (`AdapterRoom`); r is its rank."""
    rank = max(layer.shape[0] for layer in layers.values())
    made = np.zeros((rank, room.width), np.float32)
    first = 0
    for target in room.targets:
        middle, last = first + target.num_down, first + target.num_down + target.outputs
        if (layer := layers.get(plain_name(target.name))) is not None:
            made[: len(layer.down), first:middle] = layer.down
            made[: len(layer.down), middle:last] = layer.up.T
        first = last
    return made
