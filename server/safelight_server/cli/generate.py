"""`safelight generate`: one picture of a running server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from safelight import Branch, CacheMode, Control, QualityFloor

from safelight_server.cli import demo as demos
from safelight_server.cli.command import (
    DEFAULT_TARGET,
    ApiKey,
    CaFile,
    ClientCert,
    CommandError,
    ServerName,
    Target,
    check_text,
    connect_with,
    run,
)

console = Console()

MAX_STEP = 2**31 - 1
"""Largest value of the protocol's field for steps (int32); the server checks the real limit."""
Steps = Annotated[int | None, typer.Option("--steps", min=1, max=MAX_STEP, help="Denoising steps.")]
OPTIONS = {
    "prompt": "PROMPT",
    "prompts": "--negative",
    "model": "--model",
    "width_px": "--size",
    "height_px": "--size",
    "outputs": "--seed",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_rescale": "--guidance-rescale",
    "guidance_interval": "--guidance-interval",
    "sampler": "--sampler",
    "init_image": "--init",
    "strength": "--strength",
    "mask": "--mask",
    "adapters": "--adapter",
    "controls": "--control",
    "image_prompt": "--image-prompt",
    "image_prompt.scale": "--image-prompt-scale",
    "image_prompt_scale": "--image-prompt-scale",
    "branch": "--branch",
    "cache": "--cache",
    "quality_floor.min_num_steps": "--floor-steps",
    "quality_floor.cheaper_previews": "--floor-previews",
    "quality_floor.min_similarity": "--floor-similarity",
}
"""Options by what they set: a field of `GenerationSpec` or of the request, or an argument of the client library."""
MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    out: Annotated[Path, typer.Option(help="File to write: .png, .jpg or .webp.")] = Path("picture.png"),
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Seed; default: random.")] = None,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 means none.")] = None,
    sampler: Annotated[str, typer.Option(help="Sampler, such as ddim or euler.")] = "",
    negative_prompt: Annotated[str, typer.Option("--negative", help="What guidance leads away from.")] = "",
    model: Annotated[str, typer.Option(help="Id of the model.")] = "",
    size: Annotated[
        str, typer.Option(metavar="WIDTHxHEIGHT", help="One of the model's sizes; default: its first.")
    ] = "",
    timeout_s: Annotated[float | None, typer.Option("--timeout", min=0.001, help="Deadline in seconds.")] = None,
    cache: Annotated[CacheMode, typer.Option(help="Which cached results may be used.")] = "default",
    branch: Annotated[str, typer.Option(metavar="generations/ID@STEP", help="Where to start from.")] = "",
    init: Annotated[
        str, typer.Option(metavar="FILE", help="Picture to start from: PNG, JPEG or WebP, or generations/ID.")
    ] = "",
    strength: Annotated[
        float | None,
        typer.Option(help="How far the init picture may change, up to 1. Default: 0.8; 1 if the model only inpaints."),
    ] = None,
    mask: Annotated[
        str, typer.Option(metavar="FILE", help="Mask: only its white or transparent part is developed anew.")
    ] = "",
    guidance_rescale: Annotated[
        float | None, typer.Option(help="How far the contrast that guidance adds is reduced, 0 to 1.")
    ] = None,
    guidance_interval: Annotated[
        str, typer.Option(metavar="START:END", help="Guidance only in these steps, as shares: 0.2:0.8.")
    ] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:SCALE", help="Adapter (LoRA) of the model, with its factor; may be repeated."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE:SCALE:START:END",
            help="Picture for a control network (ControlNet) of the model, with its factor, and where it acts as shares"
            " of the steps; all but NAME=FILE may be left out. May be repeated.",
        ),
    ] = None,
    image_prompt: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Picture that says what to draw beside the prompt: a file, or generations/ID/outputs/0.",
        ),
    ] = "",
    image_prompt_scale: Annotated[
        float | None, typer.Option(help="How much the image prompt counts, 0 to 2. Default: 1.")
    ] = None,
    floor_steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_STEP, help="Under load: accept so few steps.")
    ] = None,
    floor_previews: Annotated[
        bool, typer.Option("--floor-previews", help="Under load: accept coarse previews.")
    ] = False,
    floor_similarity: Annotated[
        float | None, typer.Option(help="Under load: accept a picture of a prompt so similar, up to 1.")
    ] = None,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
) -> None:
    """Request one picture of a running server and watch it develop."""
    media_type = MEDIA_TYPES.get(out.suffix.lstrip(".").lower())
    if media_type is None:
        raise CommandError(f"--out {out}: the extension must be .png, .jpg or .webp")
    if out.is_dir():  # refused before the picture is developed
        raise CommandError(f"--out {out}: is a folder; add the name of a file")
    if not out.parent.is_dir():
        raise CommandError(f"--out {out}: there is no folder {out.parent}; make it first")
    check_text(
        {"PROMPT": prompt, "--negative": negative_prompt, "--model": model, "--sampler": sampler, "--branch": branch}
        | {"--adapter": " ".join(adapter or ()), "--control": " ".join(control or ())}
    )
    order = demos.DemoRequest(
        prompt,
        seed,
        steps,
        guidance_scale,
        sampler,
        negative_prompt,
        model,
        media_type,
        timeout_s,
        cache,
        _branch(branch) if branch else None,
        _picture(init),
        strength,
        _picture(mask),
        guidance_rescale,
        _interval(guidance_interval) if guidance_interval else None,
        _quality_floor(floor_steps, floor_previews, floor_similarity),
        parse_adapters(adapter or ()),
        parse_controls(control or ()),
        _picture(image_prompt),
        image_prompt_scale,
        _size(size) if size else None,
    )
    connect = connect_with(target, api_key, ca_file, client_cert, server_name)
    try:
        picture, developed = run(demos.generate_one(connect, order, console))
    except demos.DemoError as error:  # begins with the name of an argument of the client library
        argument, colon, what = str(error).partition(": ")
        raise CommandError(f"{option_of(argument)}{colon}{what}") from None
    try:
        out.write_bytes(picture.data)
    except OSError as error:
        raise CommandError(f"{out}: {error.strerror}") from None
    size = f"{picture.width_px}x{picture.height_px}"
    console.print(f"{out}  {size}  seed {picture.seed}  {developed.figures()}", highlight=False, soft_wrap=True)
    console.print(developed.origin(), highlight=False, soft_wrap=True)


def option_of(field: str) -> str:
    """The option of `safelight generate` that sets a field of the request; another field's path stays as it is."""
    plain = re.sub(r"\[[0-9]+\]", "", field).removeprefix("spec.")
    parts = plain.split(".")
    names = (".".join(parts[:most]) for most in range(len(parts), 0, -1))  # the whole path first
    return next((OPTIONS[name] for name in names if name in OPTIONS), field)


def _picture(source: str) -> Path | str | None:
    """The argument as a file, or as the name of a picture that the server has."""
    return source if source.startswith(("generations/", "images/")) else Path(source) if source else None


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if found is None:
        raise CommandError(f"--size {text}: must be WIDTHxHEIGHT, such as 768x512")
    return int(found[1]), int(found[2])


def _interval(text: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    try:
        return float(start), float(end)
    except ValueError:
        raise CommandError(f"--guidance-interval {text}: must be START:END, such as 0.2:0.8") from None


def parse_adapters(given: Sequence[str]) -> dict[str, float]:
    """The factors of adapters by name, from NAME:SCALE or NAME."""
    found: dict[str, float] = {}
    for text in given:
        name, colon, scale = text.rpartition(":")
        name = name if colon else text
        if name in found:
            raise CommandError(f"--adapter {text}: {name} is there twice")
        try:
            found[name] = float(scale) if colon else 1.0
        except ValueError:
            raise CommandError(f"--adapter {text}: must be NAME:SCALE, such as pixel:0.8, or NAME") from None
    return found


def parse_controls(given: Sequence[str]) -> list[Control]:
    """The controls of NAME=FILE:SCALE:START:END, of which all but NAME=FILE may be left out."""
    found: list[Control] = []
    for text in given:
        name, _, rest = text.partition("=")
        file, *numbers = rest.split(":")
        while not all(map(_is_number, numbers)):  # the file's name has a colon
            file = f"{file}:{numbers.pop(0)}"
        source = _picture(file)
        is_misspelt = ":" in file and not Path(file).exists()
        if not name or source is None or len(numbers) > 3 or is_misspelt:
            what = "must be NAME=FILE, or NAME=FILE:SCALE:START:END such as canny=edges.png:0.8:0:0.5"
            raise CommandError(f"--control {text}: {what}")
        if any(control.name == name for control in found):
            raise CommandError(f"--control {text}: {name} is there twice")
        found.append(Control(name, source, *map(float, numbers)))
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _quality_floor(steps: int | None, previews: bool, similarity: float | None) -> QualityFloor | None:
    if steps is None and not previews and similarity is None:
        return None
    return QualityFloor(min_num_steps=steps, cheaper_previews=previews, min_similarity=similarity)


def _branch(text: str) -> Branch:
    generation, _, step = text.partition("@")
    if not step.isdecimal():
        raise CommandError(f"--branch {text}: must be generations/ID@STEP")
    return Branch(generation=generation, step=min(int(step), MAX_STEP))
