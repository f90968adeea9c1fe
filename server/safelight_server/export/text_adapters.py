"""Gives CLIP text encoders room for adapters: the layers that kohya's and diffusers' training scripts change there.

The layers of all text encoders of a pipeline share one room. A layer's name in the manifest is that of diffusers'
files, `text_encoder_2.text_model.encoder.layers.0.mlp.fc1`, whether or not the installed transformers has a module
`text_model`.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from safelight_server.catalog.manifest import AdapterRoom
from safelight_server.export.adapters import Adapters
from safelight_server.export.source import ExportError

CLIP = CLIPTextModel | CLIPTextModelWithProjection
PARTS = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


def text_adapters_of(pipeline: DiffusionPipeline) -> Adapters:
    """Changes the CLIP text encoders of a pipeline to take adapters; those of other kinds stay as they are."""
    found = {name: getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")}
    encoders = nn.ModuleDict({name: encoder for name, encoder in found.items() if isinstance(encoder, CLIP)})
    layers = [name for name, _ in encoders.named_modules() if name.endswith(PARTS)]
    return Adapters(encoders, layers)


def fitting_text(pipeline: DiffusionPipeline, room: AdapterRoom | None) -> Adapters:
    """The text encoders' targets as a manifest names them; the text encoders are changed.

    Raises:
        ExportError: the text encoders have other layers.
    """
    made = text_adapters_of(pipeline)
    if room is None or AdapterRoom.model_validate(text_room(made, room.max_rank)) != room:
        raise ExportError("text_adapters: pipeline.json has other targets than the layers of the text encoders")
    return made


def text_room(adapters: Adapters, max_rank: int) -> dict[str, Any]:
    """What the manifest says of them (`AdapterRoom`)."""
    room = adapters.room(max_rank)
    return {**room, "targets": [{**target, "name": _name(target["name"])} for target in room["targets"]]}


def _name(path: str) -> str:
    encoder, _, layer = path.partition(".")
    return f"{encoder}.text_model.{layer.removeprefix('text_model.')}"
