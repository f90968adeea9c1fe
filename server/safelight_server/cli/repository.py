"""`safelight repository`: the model repository for Triton on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from safelight_server import settings as settings_module
from safelight_server.catalog import export as repositories
from safelight_server.catalog.export import Accelerator
from safelight_server.catalog.export import Target as RepositoryTarget
from safelight_server.settings import Settings

console = Console()


def repository(
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    target: Annotated[RepositoryTarget, typer.Option(help="Where the repository is used.")] = RepositoryTarget.GPU,
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs; each gets an instance of every component.")] = 1,
    accelerator: Annotated[Accelerator, typer.Option(help="What executes models on a GPU.")] = Accelerator.TENSORRT,
    bounded_queue: Annotated[
        bool, typer.Option(help="Priorities and bounds in Triton's queue (docs/operations/triton.md).")
    ] = False,
    models_dir: Annotated[Path | None, typer.Option(help=Settings.model_fields["models_dir"].description)] = None,
) -> None:
    """Write the model repository for Triton on GPUs (docs/operations/triton.md)."""
    source = settings_module.load(models_dir=models_dir).models_dir / "repository"
    repositories.write(source, out, target, gpus, accelerator, bounded_queue=bounded_queue)
    console.print(f"wrote {out}", highlight=False)
