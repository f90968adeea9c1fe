"""A copy of the shipped models with more pipelines beside `icons`, for tests of pipelines that cannot be served."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import onnx_files
from tests.support.onnx_files import Shape

SHIPPED = Path(__file__).parents[2] / "models"


def copy_models(folder: Path) -> Path:
    """Copies the shipped models to a new folder `models` in `folder`; large files are links."""
    models = folder / "models"
    shutil.copytree(SHIPPED / "pipelines", models / "pipelines")
    (models / "repository").mkdir()
    for model in (SHIPPED / "repository").iterdir():
        (models / "repository" / model.name).symlink_to(model)
    return models


def remove_icons(models: Path) -> None:
    """Leaves only what was added to such a folder."""
    shutil.rmtree(models / "pipelines" / "icons")
    for model in (models / "repository").glob("icons_*"):
        model.unlink()


def add_network(
    models: Path,
    name: str,
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    nodes: Sequence[bytes],
    constants: Mapping[str, np.ndarray[Any, Any]],
    max_rows: int = 4,
) -> dict[str, object]:
    """Adds a small network to the repository, with its configuration; returns its entry in a manifest.

    Args:
        inputs: shapes of a row; an axis with a name is free.
    """
    tensors = inputs | outputs
    rows = {tensor: ("rows", *shape) for tensor, shape in tensors.items()}
    data = onnx_files.network({at: rows[at] for at in inputs}, {at: rows[at] for at in outputs}, nodes, constants)
    (models / "repository" / name / "1").mkdir(parents=True)
    (models / "repository" / name / "1" / "model.onnx").write_bytes(data)
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', f"max_batch_size: {max_rows}"]
    for tensor, shape in tensors.items():
        dims = [axis if isinstance(axis, int) else -1 for axis in shape]
        form = f"dims: {dims}" if dims else "dims: [1] reshape { shape: [] }"
        side = "input" if tensor in inputs else "output"
        kind = "TYPE_INT64" if tensor == onnx_files.TOKEN_IDS else "TYPE_FP32"
        lines.append(f'{side} {{ name: "{tensor}" data_type: {kind} {form} }}')
    lines += ["dynamic_batching { max_queue_delay_microseconds: 0 }", "instance_group { kind: KIND_CPU count: 1 }"]
    lines.append('parameters { key: "intra_op_thread_count" value { string_value: "1" } }')
    (models / "repository" / name / "config.pbtxt").write_text("\n".join(lines) + "\n")
    return {"model": name, "version": 1, "sha256": hashlib.sha256(data).hexdigest()}


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
