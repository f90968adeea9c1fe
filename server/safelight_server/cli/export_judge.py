"""`safelight export-judge`: exports a CLIP as a judge of prompt agreement, for the setting quality_judge_dir."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from safelight_server.cli.export import EXTRA
from safelight_server.export.source import ExportError


def export_judge(
    folder: Annotated[Path, typer.Argument(help="A CLIPModel of transformers, with its tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
) -> None:
    """Export a CLIP that measures how well pictures agree with their prompts; needs the extra `export`."""
    if lacking := [module for module in EXTRA if importlib.util.find_spec(module) is None]:
        raise ExportError(
            f"{', '.join(lacking)} not installed: in a clone of Safelight, pip install -e clients/python -e '.[export]'"
        )
    from safelight_server.export.judge import export_judge as write  # imports torch

    write(folder, out, typer.echo)
    typer.echo(f"wrote {out}: SAFELIGHT_QUALITY_JUDGE_DIR={out}")
