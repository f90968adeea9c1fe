"""`safelight export`: exports a diffusers model into the folder of models (docs/models.md)."""

from __future__ import annotations

import importlib.util
import re
import time
from pathlib import Path
from typing import Annotated

import typer

from safelight_server import settings as settings_module
from safelight_server.export import plan
from safelight_server.export.plan import MAX_ROWS, ExportOptions, ExportPlan
from safelight_server.export.source import ExportError
from safelight_server.runtime.memory import available_bytes
from safelight_server.settings import Settings

EXTRA = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


def export(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A Stable Diffusion, SDXL, SD3 or FLUX pipeline of diffusers, or a checkpoint in one file."
        ),
    ],
    name: Annotated[str, typer.Option(help="Id of the model; default: from the folder's name.")] = "",
    revision: Annotated[str, typer.Option(help="Revision of the weights; the newest is served.")] = "1",
    licence: Annotated[
        str, typer.Option("--licence", "--license", help="SPDX id; default: that of the model card in the folder.")
    ] = "",
    description: Annotated[str, typer.Option(help="What the model draws, for people.")] = "",
    steps: Annotated[int | None, typer.Option(help="Default number of steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default guidance scale; 1 means none.")] = None,
    sampler: Annotated[str, typer.Option(help="Default sampler; default: the nearest to the folder's.")] = "",
    sizes: Annotated[str, typer.Option(help="Sizes of pictures, the first is the default: 512x512,768x512.")] = "",
    max_rows: Annotated[int, typer.Option(help="Largest batch of the denoiser.")] = MAX_ROWS,
    variant: Annotated[str, typer.Option(help="Variant of the weight files: fp16 for *.fp16.safetensors.")] = "",
    config: Annotated[
        Path | None, typer.Option(help="For a checkpoint in one file: a diffusers folder of the same architecture.")
    ] = None,
    version: Annotated[int, typer.Option(min=1, help="Triton's version folder of the components.")] = 1,
    replace: Annotated[bool, typer.Option("--replace", help="Remove all other revisions of the model.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done; takes seconds.")] = False,
    models_dir: Annotated[Path | None, typer.Option(help=Settings.model_fields["models_dir"].description)] = None,
) -> None:
    """Export a diffusers model for this server; needs the extra `export` (docs/models.md)."""
    options = ExportOptions(
        name=name or _name_of(folder),
        revision=revision,
        version=version,
        replace=replace,
        description=description,
        licence=licence,
        steps=steps,
        guidance_scale=guidance_scale,
        sizes=_sizes(sizes),
        max_rows=max_rows,
        variant=variant,
        sampler=sampler,
        config=config,
    )
    planned = plan.make(folder, options)
    for line in _summary(planned):
        typer.echo(line)
    if dry_run:
        return
    if lacking := [module for module in EXTRA if importlib.util.find_spec(module) is None]:
        raise ExportError(f"{', '.join(lacking)} not installed: pip install 'safelight-server[export]'")
    from safelight_server.export.exporter import export as write  # imports torch

    began = time.monotonic()
    models = settings_module.load(models_dir=models_dir).models_dir
    write(folder, models, options, lambda line: typer.echo(f"{time.monotonic() - began:6.0f} s  {line}"))
    typer.echo(f"wrote models/{options.name} {revision} to {models}")


def _name_of(folder: Path) -> str:
    stem = folder.stem if folder.is_file() else folder.resolve().name
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in filter(None, text.split(",")):
        size = re.fullmatch(r"\s*([0-9]{1,5})x([0-9]{1,5})\s*", part)
        if size is None:
            raise ExportError(f"--sizes {part}: must be WIDTHxHEIGHT, separated by commas")
        found.append((int(size[1]), int(size[2])))
    return tuple(found)


def _summary(planned: ExportPlan) -> list[str]:
    """The lines that describe an export to people."""
    options, offer = planned.options, planned.offer
    sizes = ", ".join(f"{width}x{height}" for width, height in options.sizes)
    default = offer.default
    placed = f"{default['name']}, {default['spacing']}, sigmas {default['sigma_schedule']}"
    shape = "x".join(map(str, planned.shape))
    lines = [
        f"models/{options.name} {options.revision}: {options.description}; licence {options.licence}",
        f"    pictures of {sizes}; latents of {shape}; at most {options.max_rows} rows a call",
        f"    {offer.prediction_type}; {options.steps} steps of {placed}; guidance {options.guidance_scale:g}",
        f"    samplers {', '.join(cell['name'] for cell in offer.cells)}",
    ]
    if total := sum(planned.num_values.values()):
        lines.append(f"    {total:,} weights: {2 * total / 2**20:,.0f} MiB of files, twice that in memory")
    if planned.peak_bytes:
        lines.append(f"    exporting takes {_gib(planned.peak_bytes)} of memory, as reckoned; free here are {_free()}")
    return lines + [f"    note: {note}" for note in planned.notes]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def _free() -> str:
    free = available_bytes()
    return "an unknown number of GiB" if free is None else _gib(free)
