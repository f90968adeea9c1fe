"""Writes the folder that the `torch` runtime loads, and says how it is read again.

It is a pipeline as diffusers saves it, and beside it what belongs to the exported
model: control networks, an IP-Adapter with its image encoder, the preview decoder.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

from safelight_server.catalog.digest import sha256
from safelight_server.catalog.manifest import Manifest
from safelight_server.export import loading
from safelight_server.export.image_prompts import IMAGE_ENCODER
from safelight_server.export.ip_adapter import image_encoder_of
from safelight_server.export.options import ExportFormat, ExportOptions
from safelight_server.export.plan import ExportPlan

TORCH_FOLDER = "torch"
"""Beside the manifest."""
CONTROLS, IMAGE_PROMPT = "controls", "image_prompt"
"""In the folder: a folder for each control network by its name, and the folder of the IP-Adapter."""
BESIDE = ("preview_decoder", "encoder.npz")
"""What belongs to the networks and is no part of a diffusers pipeline."""


def write(pipeline: DiffusionPipeline, made: ExportPlan, folder: Path) -> None:
    """Writes the networks as diffusers saves them, in float16, which weights are rounded to.

    Raises:
        ExportError: a control network or an image encoder cannot be read.
    """
    networks = [getattr(pipeline, name) for name in made.source.family.networks]
    for network in networks:
        network.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for network in networks:
        network.float()
    for (name, _), control in zip(made.options.controls, loading.control_networks(made), strict=True):
        control.half().save_pretrained(folder / CONTROLS / name, safe_serialization=True)
    if made.image_prompt is not None:
        image_encoder_of(made.image_prompt).half().save_pretrained(folder / IMAGE_PROMPT / IMAGE_ENCODER)
        shutil.copy(made.image_prompt.weights, folder / IMAGE_PROMPT / "ip-adapter.safetensors")
    for name in BESIDE:
        given = made.source.folder / name
        if given.is_dir():
            shutil.copytree(given, folder / name)
        elif given.exists():
            shutil.copy(given, folder / name)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def options_of(folder: Path, given: Manifest) -> ExportOptions:
    """The options with which a folder that was written is exported again, as far as they shape its components.

    Args:
        given: the manifest beside it.
    """
    return ExportOptions(
        given.name,
        licence=given.license,
        sizes=tuple((size.width_px, size.height_px) for size in given.sizes),
        sampler=given.defaults.sampler.name,
        format=ExportFormat.TORCH,
        adapter_rank=0 if given.adapters is None else given.adapters.max_rank,
        text_adapters=given.adapters is None or given.text_adapters is not None,
        controls=tuple((name, folder / CONTROLS / name) for name in given.controls),
        image_prompt=None if given.image_prompt is None else folder / IMAGE_PROMPT,
    )
