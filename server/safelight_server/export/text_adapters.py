"""Gives CLIP text encoders room for adapters: the layers that kohya's and diffusers' training scripts change there.

The layers of all text encoders of a pipeline share one room. A layer's name in the manifest is that of diffusers'
files, `text_encoder_2.text_model.encoder.layers.0.mlp.fc1`, whether or not the installed transformers has a module
`text_model`.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from safelight_server.export.adapters import Adapters

PARTS = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


def text_adapters_of(pipeline: DiffusionPipeline) -> Adapters:
    """Changes the text encoders of a pipeline of Stable Diffusion or SDXL to take adapters."""
    names = ("text_encoder", "text_encoder_2")
    encoders = nn.ModuleDict({name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None)})
    layers = [name for name, _ in encoders.named_modules() if name.endswith(PARTS)]
    return Adapters(encoders, layers)


def text_room(adapters: Adapters, max_rank: int) -> dict[str, Any]:
    """What the manifest says of them (`AdapterRoom`)."""
    room = adapters.room(max_rank)
    return {**room, "targets": [{**target, "name": _name(target["name"])} for target in room["targets"]]}


def _name(path: str) -> str:
    encoder, _, layer = path.partition(".")
    return f"{encoder}.text_model.{layer.removeprefix('text_model.')}"
