"""Makes the choices that the user left open: sizes, steps, guidance scale and description, from the configurations."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from safelight_server.export import networks
from safelight_server.export.options import ExportOptions
from safelight_server.export.schedulers import SamplerOffer
from safelight_server.export.source import Findings, Source

MAX_EDGE_PX = 16_384
"""Longest edge of a picture; no model of the families here was trained at a quarter of that."""
TRANSFORMER_SIZE = 128
"""Of a latent, where a transformer's configuration does not say: diffusers' default."""
DISTILLED_GUIDANCE_SCALE = 1.0
DISTILLED = re.compile(r"(?<![a-z])(turbo|lightning|lcm|dmd2?|hyper-?sd(xl)?)(?![a-z])")
"""What distilled models are called."""
Z_IMAGE_TURBO_SHIFT = 3.0
"""Of the scheduler of Z-Image-Turbo; that of Z-Image is 6."""


def sizes_of(
    source: Source, factor: int, wanted: tuple[tuple[int, int], ...], findings: Findings
) -> tuple[tuple[int, int], ...]:
    """The sizes in pixels: those wanted, or the one that the denoiser was trained at."""
    unet, largest = source.configs[source.family.denoiser], networks.largest_edge(source)
    if wanted:
        multiple = factor * networks.latent_multiple(source)
        for width, height in wanted:
            if min(width, height) < 1 or width % multiple or height % multiple:
                findings.faults.append(f"--sizes {width}x{height}: must be multiples of {multiple}")
            elif max(width, height) > MAX_EDGE_PX:
                findings.faults.append(f"--sizes {width}x{height}: edges have at most {MAX_EDGE_PX} pixels")
            elif largest is not None and max(width, height) > factor * largest:
                findings.faults.append(
                    f"--sizes {width}x{height}: the denoiser has positions for edges of at most {factor * largest}"
                )
        if len(set(wanted)) < len(wanted):
            findings.faults.append("--sizes: names a size twice")
        return wanted
    size = unet.get("sample_size", TRANSFORMER_SIZE if source.family.denoiser == "transformer" else None)
    version = re.match(r"0\.([0-9]+)\.", str(unet.get("_diffusers_version", "")))
    if isinstance(size, int) and size < 64 and version and int(version[1]) < 9:
        size = 64  # StableDiffusionPipeline mends files of that time so
    if size is None:
        findings.faults.append(f"{source.family.denoiser}/config.json: sample_size is null: say --sizes WIDTHxHEIGHT")
        return ((factor, factor),)
    height, width = (size, size) if isinstance(size, int) else size
    return ((width * factor, height * factor),)


def why_distilled(source: Source, checkpoint: Path | None, name: str, offer: SamplerOffer) -> str:
    """Why a model is taken for a distilled one, which draws in few steps and without guidance; empty: it is not.

    A folder often has no name of its own: the published model_index.json of Z-Image-Turbo has no `_name_or_path`.

    Turbo's scheduler is the sign of it: trailing timesteps are otherwise the choice for zero terminal SNR alone.
    """
    if source.family.name == "flux" and not networks.is_guidance_distilled(source):
        return "its transformer is given no guidance scale, like FLUX.1-schnell's"
    default = offer.default
    if default["name"] == "lcm":
        return "its scheduler is LCM's"
    given = checkpoint or source.folder
    names = [name, given.name, given.resolve().name, str(source.index.get("_name_or_path") or "")]
    if found := DISTILLED.search(" ".join(names).lower()):
        return f"its name says {found[1]}"
    # Downloads lie two folders below their names: models--Tongyi-MAI--Z-Image-Turbo/snapshots/04cc4abb.
    nearest = [*given.parts[-3:], *given.resolve().parts[-3:]]  # further up are a user's folders, whatever their names
    if found := DISTILLED.search(" ".join(nearest).lower()):
        return f"its folder's path says {found[1]}"
    if source.family.name == "z-image" and offer.schedule.shift == Z_IMAGE_TURBO_SHIFT:
        return f"its scheduler's shift is {Z_IMAGE_TURBO_SHIFT:g} like Z-Image-Turbo's, where Z-Image has 6"
    is_trailing = default["name"] in ("euler", "euler_ancestral") and default["spacing"] == "trailing"
    return "its timesteps are trailing" if is_trailing and not offer.schedule.rescale_zero_terminal_snr else ""


def completed(
    source: Source,
    checkpoint: Path | None,
    options: ExportOptions,
    sizes: tuple[tuple[int, int], ...],
    distilled: bool,
) -> ExportOptions:
    """The options with every choice made."""
    family = source.family
    steps = options.steps if options.steps is not None else (family.distilled_steps if distilled else family.steps)
    scale = options.guidance_scale
    if scale is None:
        scale = (
            DISTILLED_GUIDANCE_SCALE
            if distilled and not networks.is_guidance_distilled(source)
            else family.guidance_scale
        )
    described = options.description or f"{source.index['_class_name']} from {(checkpoint or source.folder).name}"
    return replace(options, steps=steps, guidance_scale=scale, sizes=sizes, description=described)
