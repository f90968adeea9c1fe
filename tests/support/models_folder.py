"""A copy of the shipped models with more pipelines beside `icons`, for tests of pipelines that cannot be served."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[2] / "models"


def copy_models(folder: Path) -> Path:
    """Copies the shipped models to a new folder `models` in `folder`; large files are links."""
    models = folder / "models"
    shutil.copytree(SHIPPED / "pipelines", models / "pipelines")
    (models / "repository").mkdir()
    for model in (SHIPPED / "repository").iterdir():
        (models / "repository" / model.name).symlink_to(model)
    return models


def add_pipeline(models: Path, name: str, network: bytes | None = None, **changes: Any) -> Path:
    """Adds a pipeline like `icons`; `changes` replace entries of its manifest, `network` its denoiser's file."""
    [shipped] = (models / "pipelines" / "icons").iterdir()
    place = models / "pipelines" / name / "1"
    shutil.copytree(shipped, place)
    manifest = json.loads((place / "pipeline.json").read_text()) | {"name": name, "revision": "1"} | changes
    if network is not None:
        model = models / "repository" / f"{name}_denoiser"
        (model / "1").mkdir(parents=True)
        shutil.copy(models / "repository" / "icons_denoiser" / "config.pbtxt", model / "config.pbtxt")
        (model / "1" / "model.onnx").write_bytes(network)
        digest = hashlib.sha256(network).hexdigest()
        manifest["components"]["denoiser"] = {"model": model.name, "version": 1, "sha256": digest}
    (place / "pipeline.json").write_text(json.dumps(manifest))
    return place / "pipeline.json"
