"""Generates pictures from the shipped ONNX files with the server's samplers, without the server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safelight_server.catalog.catalog import load_pipeline
from safelight_server.quantization.offline import OfflinePipeline


class Sampler(OfflinePipeline):
    """A pipeline of `models/` at its default settings."""

    def __init__(self, manifest: Path, threads: int = 1) -> None:
        super().__init__(load_pipeline(manifest, manifest.parents[3] / "repository"), threads=threads)
        self.manifest = json.loads(manifest.read_text())


def shares(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Converts the decoder's images from [-1, 1] to [0, 1], clamped and not rounded."""
    return np.clip(images / 2 + np.float32(0.5), 0, 1)
