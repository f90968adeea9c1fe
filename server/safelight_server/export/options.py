"""What the user of `safelight export` chooses."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

MAX_ROWS = 64
"""Largest batch of a denoiser that is offered, unless the user says; other components get a quarter of it."""


class ExportFormat(enum.StrEnum):
    """What is written: ONNX files for the runtimes `onnx` and `triton`, safetensors for `torch`, or both."""

    ONNX = "onnx"
    TORCH = "torch"
    BOTH = "both"


class AdapterLayers(enum.StrEnum):
    """Which layers of a denoiser get room for adapters. A transformer has no others than those of its blocks."""

    ATTENTION = "attention"
    BLOCKS = "blocks"
    ALL = "all"


@dataclass(frozen=True)
class ExportOptions:
    """The user's choices. An empty value leaves the choice to the folder.

    Attributes:
        version: Triton's version folder of the components.
        replace: whether all other revisions of the name are removed.
        licence: SPDX identifier of the weights' licence; empty takes what the folder's model card says.
        steps: default num_inference_steps.
        sizes: pictures' (width, height) in pixels, the default first.
        max_rows: largest batch of the denoiser.
        variant: of the files of weights, such as "fp16".
        sampler: the default sampler.
        config: for a checkpoint in one file, a diffusers folder of the same architecture.
        format: which files are written.
        adapter_rank: room for adapters: the ranks of all adapters of a row together; 0: none.
        adapter_layers: the layers that have that room.
        text_adapters: whether the text encoders get that room too.
        controls: control networks, each with its name and its folder.
        image_prompt: the weights of an IP-Adapter, or their folder; None: no image prompts.
    """

    name: str
    revision: str = "1"
    version: int = 1
    replace: bool = False
    description: str = ""
    licence: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    max_rows: int = MAX_ROWS
    variant: str = ""
    sampler: str = ""
    config: Path | None = None
    format: ExportFormat = ExportFormat.ONNX
    adapter_rank: int = 0
    adapter_layers: AdapterLayers = AdapterLayers.BLOCKS
    text_adapters: bool = True
    controls: tuple[tuple[str, Path], ...] = ()
    image_prompt: Path | None = None
