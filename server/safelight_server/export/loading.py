"""Loads the networks of a plan with diffusers and transformers, and refuses weights that do not fill them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from safelight_server.export.plan import ExportPlan
from safelight_server.export.source import ExportError


def load(made: ExportPlan) -> StableDiffusionPipeline:
    """The pipeline, on the CPU in float32.

    Raises:
        ExportError: the weights cannot be read, or lack some of a network's.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return _from_file(made) if made.checkpoint else _from_folder(made)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"{made.checkpoint or made.source.folder} cannot be read: {_first_line(error)}") from None


def _from_folder(made: ExportPlan) -> StableDiffusionPipeline:
    folder, variant = made.source.folder, made.options.variant or None
    vae = getattr(diffusers, made.source.index["vae"][1])
    classes: dict[str, type[Any]] = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": vae}
    loaded = {name: _network(kind, folder / name, variant) for name, kind in classes.items()}
    return StableDiffusionPipeline.from_pretrained(
        folder, **loaded, safety_checker=None, local_files_only=True, dtype=torch.float32
    )


def _network(kind: type[Any], folder: Path, variant: str | None) -> nn.Module:
    network: nn.Module
    network, found = kind.from_pretrained(
        folder, variant=variant, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    lacking = sorted(str(key) for key in (*found["missing_keys"], *found.get("mismatched_keys", ())))
    if lacking:  # torch would fill them with random numbers
        raise ExportError(f"{folder.name}: the files lack {len(lacking)} of its weights, such as {lacking[0]}")
    return network


def _from_file(made: ExportPlan) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_single_file(
        str(made.checkpoint),
        config=str(made.source.folder),
        local_files_only=True,
        safety_checker=None,
        dtype=torch.float32,
    )
    for name in ("text_encoder", "unet", "vae"):
        for key, tensor in getattr(pipeline, name).named_parameters():
            if tensor.is_meta:
                raise ExportError(f"{made.checkpoint} lacks weights of {name}, such as {key}")
    return pipeline


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
