"""Generates pictures from the shipped ONNX files with the server's samplers, without the server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safelight_server.catalog import adapter_files
from safelight_server.catalog.catalog import load_pipeline
from safelight_server.catalog.pixels import to_pixels
from safelight_server.domain.component import Component
from safelight_server.quantization.offline import OfflinePipeline
from safelight_server.runtime import onnx


class Sampler(OfflinePipeline):
    """A pipeline of `models/` at its default settings.

    Args:
        adapter: the file of an adapter, for a pipeline that has room for it.
    """

    def __init__(self, manifest: Path, threads: int = 1, adapter: Path | None = None) -> None:
        pipeline = load_pipeline(manifest, manifest.parents[3] / "repository")
        room, weights = pipeline.manifest.adapters, None
        if adapter is not None and room is not None:
            weights = adapter_files.packed(adapter_files.parse(adapter.read_bytes()), room)
        elif adapter is not None:
            raise SystemExit(f"{manifest} has no room for adapters: export it with --adapter-rank")
        super().__init__(pipeline, threads=threads, adapter=weights)
        self.manifest = json.loads(manifest.read_text())
        self._encode = onnx.loaded(pipeline.files[Component.ENCODER], threads)

    def decoded(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Pictures (N, S, S, 3), encoded and decoded: what is left of them if the denoiser makes no mistake."""
        images = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        decode = self._calls[Component.DECODER]
        parts = [decode({"latent": self._encode({"image": image[None]})["mean"]})["image"][0] for image in images]
        return np.stack([to_pixels(image) for image in parts])


def shares(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Converts the decoder's images from [-1, 1] to [0, 1], clamped and not rounded."""
    return np.clip(images / 2 + np.float32(0.5), 0, 1)
