"""Pictures of the shipped weights, straight from the ONNX files: the server's samplers without the server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from safelight_server.sampler import NoiseSchedule, SamplerSpec, advance, compile_table, gaussian, guide
from safelight_server.tokenizer import Tokenizer

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
            yield from self._batch(prompts[start : start + BATCH], seeds[start : start + BATCH])

    def _batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        manifest, defaults = self.manifest, self.manifest["defaults"]
        schedule = NoiseSchedule(**manifest["noise_schedule"])
        spec = SamplerSpec(**defaults["sampler"])
        table = compile_table(spec, schedule, manifest["prediction_type"], defaults["num_inference_steps"])
        latent = manifest["latent"]
        shape = (latent["channels"], latent["height"], latent["width"])
        rows = len(prompts)
        ids = np.array([self._tokenizer.encode(text).ids for text in [*prompts, *[""] * rows]], np.int64)
        context = self._run("text_encoder", input_ids=ids)
        x = np.stack([np.float32(table.init_scale) * gaussian(seed, 0, 0, shape) for seed in seeds])
        denoised = np.zeros_like(x)
        scale = np.full(rows, defaults["guidance_scale"], np.float32)
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
        image = self._run("decoder", latent=x / np.float32(latent["scaling_factor"]))
        pixels = np.round(np.clip(image / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))

    def _run(self, role: str, **inputs: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = self._sessions[role].run(None, inputs)[0]
        return result
