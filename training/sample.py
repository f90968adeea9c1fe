"""Generates pictures from the shipped ONNX files with the server's samplers, without the server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from safelight_server.catalog.tokenizer import Tokenizer
from safelight_server.sampler import NoiseSchedule, SamplerSpec, advance, compile_table, gaussian, guide

BATCH = 16


class Sampler:
    """A pipeline of `models/` at its default settings."""

    def __init__(self, manifest: Path, threads: int = 1) -> None:
        self.manifest = json.loads(manifest.read_text())
        repository = manifest.parents[3] / "repository"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._sessions = {
            role: onnxruntime.InferenceSession(repository / at["model"] / str(at["version"]) / "model.onnx", options)
            for role, at in self.manifest["components"].items()
        }
        at = self.manifest["tokenizer"]
        self._tokenizer = Tokenizer(
            manifest.parent / at["file"], at["max_tokens"], at["pad_id"], at["bos_id"], at["eos_id"]
        )

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """(H, W, 3) uint8 each, in order."""
        for start in range(0, len(prompts), BATCH):
            images = self.images(prompts[start : start + BATCH], seeds[start : start + BATCH])
            yield from np.ascontiguousarray(np.round(images * 255).astype(np.uint8).transpose(0, 2, 3, 1))

    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float | None = None,
        spec: SamplerSpec | None = None,
        num_steps: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """One batch as (B, 3, H, W) in [0, 1], not rounded; what is not given is the pipeline's default."""
        manifest, defaults = self.manifest, self.manifest["defaults"]
        schedule = NoiseSchedule(**manifest["noise_schedule"])
        spec = spec or SamplerSpec(**defaults["sampler"])
        steps = num_steps or defaults["num_inference_steps"]
        table = compile_table(spec, schedule, manifest["prediction_type"], steps)
        latent = manifest["latent"]
        shape = (latent["channels"], latent["height"], latent["width"])
        rows = len(prompts)
        scale = np.full(rows, guidance_scale or defaults["guidance_scale"], np.float32)
        ids = np.array([self._tokenizer.encode(text).ids for text in [*prompts, *[""] * rows]], np.int64)
        context = self._run("text_encoder", input_ids=ids)
        x = np.stack([np.float32(table.init_scale) * gaussian(seed, 0, 0, shape) for seed in seeds])
        denoised = np.zeros_like(x)
        for step in range(table.num_steps):
            prediction = self._run(
                "denoiser",
                sample=np.concatenate([x, x]) * table.in_scale[step],
                timestep=np.full(2 * rows, table.timesteps[step], np.float32),
                encoder_hidden_states=context,
            )
            guided = guide(prediction[:rows], prediction[rows:], scale)
            noise = np.stack([gaussian(seed, 1, step, shape) for seed in seeds]) if table.uses_noise else None
            x, denoised = advance(x, guided, denoised, noise, np.repeat(table.coefficients[step : step + 1], rows, 0))
        image = self._run(
            "decoder", latent=x / np.float32(latent["scaling_factor"]) + np.float32(latent["shift_factor"])
        )
        return np.clip(image / 2 + np.float32(0.5), 0, 1)

    def _run(self, role: str, **inputs: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = self._sessions[role].run(None, inputs)[0]
        return result
