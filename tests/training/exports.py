"""Exports that several test modules use: each is made once in a session, whichever process asks first."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from safelight_server.export.exporter import export
from safelight_server.export.options import ExportOptions

from tests.training import folders


def once(place: Path, fill: Callable[[Path], None]) -> Path:
    """`place`, a folder that `fill` has filled. Other processes wait meanwhile; nobody may change what is in it."""
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            unfinished = place.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a try that has failed
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(place)
    return place


def exported_once(session_folder: Path, pipeline: str, options: ExportOptions) -> Path:
    """A folder with `pipeline/`, saved by diffusers, and `models/`, its export, which takes no init images.

    Args:
        pipeline: the function of `folders` that makes it.
    """

    def fill(place: Path) -> None:
        getattr(folders, pipeline)().save_pretrained(place / "pipeline")
        folders.spare_encoder(place / "pipeline")
        export(place / "pipeline", place / "models", options)

    digest = hashlib.sha256(repr(options).encode()).hexdigest()
    return once(session_folder / f"{pipeline}-{digest[:16]}", fill)
