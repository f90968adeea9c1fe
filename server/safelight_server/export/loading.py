"""Loads the networks of a plan with diffusers and transformers, and refuses weights that do not fill them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import nn

from safelight_server.export.plan import ExportPlan
from safelight_server.export.source import ExportError

WITHOUT: Mapping[str, Mapping[str, object]] = {
    "StableDiffusionPipeline": {"safety_checker": None},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
    "StableDiffusion3Pipeline": {"image_encoder": None, "feature_extractor": None},
    "FluxPipeline": {"image_encoder": None, "feature_extractor": None},
    "ZImagePipeline": {},
}
"""By pipeline class, the arguments that leave out the parts which are not exported."""


def load(made: ExportPlan) -> DiffusionPipeline:
    """The pipeline, on the CPU in float32.

    Raises:
        ExportError: the weights cannot be read, or some are missing.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return _from_file(made) if made.checkpoint else _from_folder(made)
    except (OSError, ValueError, RuntimeError, KeyError, SingleFileComponentError) as error:
        raise ExportError(f"{made.checkpoint or made.source.folder} cannot be read: {_first_line(error)}") from None


def _from_folder(made: ExportPlan) -> DiffusionPipeline:
    folder, variant, index = made.source.folder, made.options.variant or None, made.source.index
    loaded = {}
    for name in made.source.family.networks:
        library = transformers if name in made.source.family.text_encoders else diffusers
        loaded[name] = _network(getattr(library, index[name][1]), folder / name, variant)
    kind = made.source.pipeline_class
    pipeline: DiffusionPipeline = getattr(diffusers, kind).from_pretrained(
        folder, **loaded, **WITHOUT[kind], local_files_only=True, dtype=torch.float32
    )
    return pipeline


def control_networks(made: ExportPlan) -> list[nn.Module]:
    """The control networks of a plan, in its order, on the CPU in float32.

    Raises:
        ExportError: weights cannot be read, or some are missing.
    """
    found = []
    for name, folder in made.options.controls:
        try:
            found.append(_network(diffusers.ControlNetModel, folder, made.options.variant or None))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ExportError(f"--control {name}={folder} cannot be read: {_first_line(error)}") from None
    return found


def _network(kind: type[Any], folder: Path, variant: str | None) -> nn.Module:
    network: nn.Module
    network, found = kind.from_pretrained(
        folder, variant=variant, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    lacking = sorted(str(key) for key in (*found["missing_keys"], *found.get("mismatched_keys", ())))
    if lacking:  # torch would fill them with random numbers
        raise ExportError(f"{folder.name}: the files lack {len(lacking)} of its weights, such as {lacking[0]}")
    return network


def _from_file(made: ExportPlan) -> DiffusionPipeline:
    kind = made.source.pipeline_class
    pipeline: DiffusionPipeline = getattr(diffusers, kind).from_single_file(
        str(made.checkpoint),
        config=str(made.source.folder),
        local_files_only=True,
        **WITHOUT[kind],
        dtype=torch.float32,
    )
    for name in made.source.family.networks:
        for key, tensor in getattr(pipeline, name).named_parameters():
            if tensor.is_meta:
                raise ExportError(f"{made.checkpoint} lacks weights of {name}, such as {key}")
    return pipeline


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
