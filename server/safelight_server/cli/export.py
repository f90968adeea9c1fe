"""`safelight export`: exports a diffusers model into the folder of models (docs/models.md)."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight_server import settings as settings_module
from safelight_server.catalog import revisions
from safelight_server.export import plan
from safelight_server.export.options import MAX_ROWS, AdapterLayers, ExportFormat, ExportOptions
from safelight_server.export.plan import ExportPlan
from safelight_server.export.source import ExportError
from safelight_server.quantization import judges, quality
from safelight_server.runtime.memory import available_bytes
from safelight_server.settings import Settings

EXTRA = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


def export(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A pipeline of diffusers (Stable Diffusion, SDXL, SD3, FLUX or Z-Image), or a checkpoint in one file."
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
    format: Annotated[
        ExportFormat,
        typer.Option(help="Files to write: onnx (also for Triton), torch (for runtime torch), or both."),
    ] = ExportFormat.ONNX,
    adapter_rank: Annotated[
        int, typer.Option(help="Room for adapters (LoRA) in each row: their ranks together. 0: none.")
    ] = 0,
    adapter_layers: Annotated[
        AdapterLayers | None,
        typer.Option(
            help="With --adapter-rank: the layers that adapters can change. attention; blocks, the default: all layers"
            " of the transformer blocks, which kohya's scripts change; all: also the convolutions (LoCon)."
        ),
    ] = None,
    text_adapters: Annotated[
        bool,
        typer.Option(
            "--text-adapters/--no-text-adapters",
            help="With --adapter-rank: room in the text encoders too, for adapters that change them.",
        ),
    ] = True,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Control network (ControlNet) of diffusers; may be repeated."),
    ] = None,
    image_prompt: Annotated[
        Path | None,
        typer.Option(
            help="An IP-Adapter, so that requests can have a picture as a prompt: its .safetensors file, or the folder"
            " with it; image_encoder/ lies beside it."
        ),
    ] = None,
    version: Annotated[int, typer.Option(min=1, help="Triton's version folder of the components.")] = 1,
    replace: Annotated[bool, typer.Option("--replace", help="Remove all other revisions of the model.")] = False,
    quantize: Annotated[
        str,
        typer.Option(
            help="int8: also makes a revision REVISION-int8, served as NAME@int8. The folder may then be that of a"
            " revision that was exported before: models/pipelines/NAME/REVISION."
        ),
    ] = "",
    min_psnr: Annotated[
        float | None, typer.Option(help="With --quantize: least median of PSNR to the float pictures, in dB; 20.")
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="With --quantize: MODULE:FUNCTION that labels pictures, called with prompts and (N, H, W, 3) bytes;"
            " returns (N, K) labels."
        ),
    ] = "",
    min_agreement: Annotated[
        float | None, typer.Option(help="With --judge: least share of labels that stay the same; 0.95.")
    ] = None,
    compare: Annotated[
        int | None, typer.Option(min=1, max=1000, help="With --quantize: pictures to compare; 16.")
    ] = None,
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
        format=format,
        adapter_rank=adapter_rank,
        adapter_layers=adapter_layers or AdapterLayers.BLOCKS,
        text_adapters=text_adapters,
        controls=_controls(control or ()),
        image_prompt=image_prompt,
    )
    if adapter_layers is not None and not adapter_rank:
        raise ExportError("--adapter-layers: goes with --adapter-rank; leave it out")
    gate = _gate(quantize, min_psnr, judge, min_agreement, compare)
    if quantize and format is ExportFormat.TORCH:
        raise ExportError("--quantize: quantizes the files of ONNX Runtime; use --format onnx or both")
    judged = judges.judge_of(judge) if judge else None  # first: one that is refused costs no export
    exported = folder / "pipeline.json"
    if quantize and exported.is_file():
        of_exports = {
            "--name": name,
            "--revision": revision != "1",
            "--licence": licence,
            "--description": description,
            "--steps": steps,
            "--guidance-scale": guidance_scale,
            "--sampler": sampler,
            "--sizes": sizes,
            "--max-rows": max_rows != MAX_ROWS,
            "--variant": variant,
            "--config": config,
            "--format": format is not ExportFormat.ONNX,
            "--adapter-rank": adapter_rank,
            "--no-text-adapters": not text_adapters,
            "--control": control,
            "--image-prompt": image_prompt,
            "--version": version != 1,
            "--replace": replace,
            "--models-dir": models_dir,
        }
        if given := [option for option, value in of_exports.items() if value]:
            raise ExportError(
                f"{', '.join(given)}: {folder} was exported already, and --quantize takes it as it is;"
                " give the folder of diffusers, or leave them out"
            )
    else:
        for line in _summary(plan.make(folder, options)):
            typer.echo(line)
    if quantize:
        typer.echo(f"then a revision whose denoiser is quantized to {quantize}, if its pictures are good enough")
    if dry_run:
        return
    if lacking := [module for module in EXTRA if importlib.util.find_spec(module) is None]:
        raise ExportError(
            f"{', '.join(lacking)} not installed: in a clone of Safelight, pip install -e clients/python -e '.[export]'"
        )
    began = time.monotonic()
    models = settings_module.load(models_dir=models_dir).models_dir

    def report(line: str) -> None:
        typer.echo(f"{time.monotonic() - began:6.0f} s  {line}")

    if not exported.is_file():
        from safelight_server.export.exporter import export as write  # imports torch

        write(folder, models, options, report)
        typer.echo(f"wrote models/{options.name} {revision} to {models}")
        exported = models / "pipelines" / options.name / revision / "pipeline.json"
    if quantize:
        from safelight_server.quantization import quantize as quantization  # imports onnx

        written = quantization.quantize(exported, quality.QualityOptions(judge=judged, **gate), report)
        typer.echo(f"wrote {written.parent}")


def _gate(
    quantize: str, min_psnr: float | None, judge: str, min_agreement: float | None, compare: int | None
) -> dict[str, Any]:
    """The options of a quantization that were given.

    Raises:
        ExportError: one has nothing to go with.
    """
    if quantize not in ("", *revisions.SCHEMES):
        raise ExportError(f"--quantize {quantize}: must be {' or '.join(revisions.SCHEMES)}")
    options = {"--min-psnr": min_psnr, "--judge": judge or None, "--compare": compare}
    if not quantize and (given := [name for name, value in options.items() if value is not None]):
        raise ExportError(f"{', '.join(given)}: goes with --quantize; leave it out")
    if min_agreement is not None and not judge:
        raise ExportError("--min-agreement: goes with --judge; leave it out")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ExportError(f"--min-agreement {min_agreement:g}: must be a share, from 0 to 1")
    if min_psnr is not None and not 0 <= min_psnr <= quality.MAX_PSNR_DB:
        raise ExportError(f"--min-psnr {min_psnr:g}: must be from 0 to {quality.MAX_PSNR_DB:g} dB")
    found = {"min_psnr_db": min_psnr, "min_agreement": min_agreement, "num_pictures": compare}
    return {name: value for name, value in found.items() if value is not None}


def _name_of(folder: Path) -> str:
    stem = folder.stem if folder.is_file() else folder.resolve().name
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")


def _controls(given: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    pairs = [text.partition("=") for text in given]
    for text, (name, _, folder) in zip(given, pairs, strict=True):
        if not name or not folder:
            raise ExportError(f"--control {text}: must be NAME=FOLDER, such as canny=sd-controlnet-canny")
    return tuple((name, Path(folder)) for name, _, folder in pairs)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in filter(None, text.split(",")):
        size = re.fullmatch(r"\s*([0-9]{1,5})x([0-9]{1,5})\s*", part)
        if size is None:
            raise ExportError(f"--sizes {part}: must be WIDTHxHEIGHT, separated by commas")
        found.append((int(size[1]), int(size[2])))
    if text and not found:
        raise ExportError(f"--sizes {text}: names no size; it must be WIDTHxHEIGHT, separated by commas")
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
    if planned.is_default_assumed:
        lines.append(
            "    nothing says that it is distilled (turbo, lightning ...), so these steps and this guidance are those"
            f" of {planned.source.pipeline_class}; --steps and --guidance-scale give others"
        )
    if options.adapter_rank:
        also = ", and in the text encoders" if planned.has_text_adapters else ""
        lines.append(
            f"    room for adapters of rank {options.adapter_rank} in each row,"
            f" in the layers {options.adapter_layers}{also}"
        )
    if options.controls:
        lines.append(f"    control networks {', '.join(name for name, _ in options.controls)}")
    if (prompt := planned.image_prompt) is not None:
        taken = f"{prompt.num_tokens} tokens of {prompt.edge_px}x{prompt.edge_px} pixels, from {prompt.weights.name}"
        lines.append(f"    pictures as prompts: {taken}")
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
