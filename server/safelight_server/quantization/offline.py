"""Draws pictures of a pipeline without a server: a few at a time, on ONNX Runtime, to calibrate and to compare.

The arithmetic is the server's own: its tokenizers, sampler tables, noise and rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from safelight_server.catalog.manifest import (
    ADAPTER_SCALES_SOURCE,
    ADAPTER_WEIGHTS_SOURCE,
    ENCODER_SOURCE,
    LATENT_SOURCE,
    SIZE_IDS_SOURCE,
    TIMESTEP_SOURCE,
)
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.catalog.pixels import decoder_latent, to_pixels
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.engine.adapters import prompt_inputs
from safelight_server.quantization.quality import Pictures
from safelight_server.runtime import onnx
from safelight_server.sampler import SamplerSpec, advance, compile_table, gaussian, guide

BATCH = 4
"""Pictures that are drawn at once, where the denoiser takes their rows."""

Inputs = Mapping[str, Array]
Call = Callable[[Inputs], Mapping[str, FloatArray]]


class OfflinePipeline:
    """The networks of a pipeline that make pictures from texts, loaded; at its first size and default settings.

    Args:
        denoiser: another file to take the place of the pipeline's denoiser.
        threads: of each call.
        adapter: weights (r, Q) of an adapter that changes the denoiser, where it has room (`manifest.AdapterRoom`).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        denoiser: Path | None = None,
        threads: int = 1,
        adapter: FloatArray | None = None,
    ) -> None:
        if pipeline.tokenizer is None:
            raise ValueError(f"{pipeline.name} was assembled without its tokenizer")
        self._pipeline, self._tokenizer, self._adapter = pipeline, pipeline.tokenizer, adapter
        files = {**pipeline.files, **({Component.DENOISER: denoiser} if denoiser is not None else {})}
        self._calls = {
            component: onnx.loaded(files[component], threads)
            for component in (Component.TEXT_ENCODER, Component.DENOISER, Component.DECODER)
        }

    @property
    def denoiser(self) -> Call:
        """Runs the denoiser on a batch of rows: inputs by name, (B, ...), to "prediction", (B, C, h, w)."""
        return self._calls[Component.DENOISER]

    def pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], watch: Callable[[Inputs], None] = lambda inputs: None
    ) -> Pictures:
        """(N, H, W, 3) uint8, a picture for each prompt and its seed; `watch` is given the inputs of each step."""
        rows = 2 if self._pipeline.manifest.defaults.guidance_scale > 1 else 1
        most = self._pipeline.max_rows.get(Component.DENOISER, BATCH * rows)
        count = max(1, min(BATCH, most // rows))
        parts = [
            self.images(prompts[first : first + count], seeds[first : first + count], watch=watch)
            for first in range(0, len(prompts), count)
        ]
        return np.stack([to_pixels(image) for part in parts for image in part])

    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float | None = None,
        spec: SamplerSpec | None = None,
        num_steps: int | None = None,
        watch: Callable[[Inputs], None] = lambda inputs: None,
        denoiser: Call | None = None,
    ) -> FloatArray:
        """One batch as the decoder makes it, (B, 3, H, W), nominally in [-1, 1]; what is not given is the default."""
        pipeline, manifest, count = self._pipeline, self._pipeline.manifest, len(prompts)
        default, size = manifest.defaults.sampler, manifest.sizes[0]
        spec = spec or SamplerSpec(default.name, default.spacing, default.sigma_schedule, default.eta)
        steps = num_steps or manifest.defaults.num_inference_steps
        table = compile_table(spec, pipeline.schedule, manifest.prediction_type, steps)
        scale = guidance_scale or manifest.defaults.guidance_scale
        texts = [*prompts, *([""] * count if scale > 1 else [])]
        embeddings = self._embeddings(texts)
        shape = pipeline.latent_shape(size.width_px, size.height_px)
        x = np.stack([np.float32(table.init_scale) * gaussian(seed, 0, 0, shape) for seed in seeds])
        denoised = np.zeros_like(x)
        for step in range(table.num_steps):
            sample = np.concatenate([x, x] if scale > 1 else [x]) * table.in_scale[step]
            inputs = self._inputs(sample, float(table.timesteps[step]), embeddings, pipeline.size_ids(shape))
            watch(inputs)
            prediction = (denoiser or self.denoiser)(inputs)["prediction"]
            if scale > 1:
                prediction = guide(prediction[:count], prediction[count:], np.full(count, scale, np.float32))
            noise = np.stack([gaussian(seed, 1, step, shape) for seed in seeds]) if table.uses_noise else None
            coefficients = np.repeat(table.coefficients[step : step + 1], count, 0)
            x, denoised = advance(x, prediction, denoised, noise, coefficients)
        return self._calls[Component.DECODER]({"latent": decoder_latent(pipeline, x)})["image"]

    def _embeddings(self, texts: Sequence[str]) -> Mapping[str, FloatArray]:
        """What the text encoder makes of the texts, (B, ...) by output; each text is encoded once."""
        encode = self._calls[Component.TEXT_ENCODER]
        text_room = self._pipeline.manifest.text_adapters
        nothing = {} if text_room is None else prompt_inputs(text_room, [()])  # adapters change the denoiser alone here
        ids = {text: np.array([self._tokenizer.encode(text).ids]) for text in set(texts)}
        once = {text: encode({"input_ids": at, **nothing}) for text, at in ids.items()}
        names = self._pipeline.embedding_outputs
        return {name: np.concatenate([once[text][name] for text in texts]) for name in names}

    def _inputs(
        self, sample: FloatArray, timestep: float, embeddings: Mapping[str, FloatArray], size_ids: FloatArray
    ) -> Inputs:
        """The inputs of the denoiser by name, each from its source."""
        count = len(sample)
        by_source = {ENCODER_SOURCE + name: values for name, values in embeddings.items()}
        by_source[LATENT_SOURCE] = sample
        by_source[TIMESTEP_SOURCE] = np.full(count, timestep, np.float32)
        by_source[SIZE_IDS_SOURCE] = np.tile(size_ids, (count, 1))
        if (room := self._pipeline.manifest.adapters) is not None:
            weights = np.zeros((count, room.max_rank, room.width), np.float32)
            if self._adapter is not None:
                weights[:, : len(self._adapter)] = self._adapter
            by_source[ADAPTER_WEIGHTS_SOURCE] = weights
            by_source[ADAPTER_SCALES_SOURCE] = np.ones((count, room.max_rank), np.float32)
        return {name: by_source[source] for name, source in self._pipeline.manifest.inputs.items()}
