"""Draws pictures of a pipeline without a server: a few at a time, on ONNX Runtime, to calibrate and to compare.

The arithmetic is the server's own: its tokenizers, sampler tables, noise, inputs of the denoiser and rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from safelight_server.catalog.manifest import IMAGE_PROMPT_OUTPUTS, SizeOffer
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.catalog.pixels import decoder_latent, encoder_image, to_pixels
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Array, Embedding, FloatArray
from safelight_server.engine.adapters import RowAdapter, prompt_inputs
from safelight_server.engine.jobs import InitImage
from safelight_server.engine.latents import COND, UNCOND, Latents, RowImagePrompt, RowMaskedImage
from safelight_server.quantization.conditions import Conditions
from safelight_server.quantization.judges import Pictures
from safelight_server.runtime import onnx
from safelight_server.runtime.base import StableRows
from safelight_server.sampler import SamplerSpec, compile_table

BATCH = 4
"""Pictures that are drawn at once, where the denoiser takes their rows."""

Inputs = Mapping[str, Array]
Call = Callable[[Inputs], Mapping[str, FloatArray]]


class OfflinePipeline:
    """The networks of a pipeline that make pictures from texts, loaded; at default settings.

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
        self._pipeline, self._tokenizer = pipeline, pipeline.tokenizer
        self._adapters = () if adapter is None else (RowAdapter(adapter, 1.0),)
        files = {**pipeline.files, **({Component.DENOISER: denoiser} if denoiser is not None else {})}
        needed = [Component.TEXT_ENCODER, Component.DENOISER, Component.DECODER]
        needed += [Component.ENCODER] if pipeline.manifest.is_inpainting else []
        needed += [Component.IMAGE_ENCODER] if pipeline.manifest.image_prompt is not None else []
        self._calls = {component: onnx.loaded(files[component], threads) for component in needed}

    @property
    def denoiser(self) -> Call:
        """Runs the denoiser on a batch of rows: inputs by name, (B, ...), to "prediction", (B, C, h, w)."""
        return self._calls[Component.DENOISER]

    def pictures(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        watch: Callable[[Inputs], None] = lambda inputs: None,
        size: SizeOffer | None = None,
        conditions: Sequence[Conditions] = (),
    ) -> Pictures:
        """(N, H, W, 3) uint8, a picture for each prompt and its seed.

        Args:
            watch: is given the inputs of the denoiser in each step.
            size: None: the first of the pipeline.
            conditions: of each picture; empty: there are none.

        Raises:
            NotFiniteError: a picture has infinite or NaN values.
        """
        rows = 2 if self._is_guided(self._pipeline.manifest.defaults.guidance_scale) else 1
        most = self._pipeline.max_rows.get(Component.DENOISER, BATCH * rows)
        count = max(1, min(BATCH, most // rows))
        parts = [
            self.images(
                prompts[first : first + count],
                seeds[first : first + count],
                watch=watch,
                size=size,
                conditions=conditions[first : first + count],
            )
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
        size: SizeOffer | None = None,
        conditions: Sequence[Conditions] = (),
    ) -> FloatArray:
        """One batch as the decoder makes it, (B, 3, H, W), nominally in [-1, 1]; what is not given is the default."""
        pipeline, manifest, count = self._pipeline, self._pipeline.manifest, len(prompts)
        default, at = manifest.defaults.sampler, size or manifest.sizes[0]
        shape = pipeline.latent_shape(at.width_px, at.height_px)
        spec = spec or SamplerSpec(default.name, default.spacing, default.sigma_schedule, default.eta)
        steps = num_steps or manifest.defaults.num_inference_steps
        table = compile_table(spec, pipeline.schedule.at(*shape[1:]), manifest.prediction_type, steps)
        scale = guidance_scale or manifest.defaults.guidance_scale
        is_guided = self._is_guided(scale)
        embeddings = self._embeddings([*prompts, *([""] if is_guided else [])])
        latents = Latents(
            count,
            shape,
            {name: values.shape for name, values in embeddings[prompts[0]].items()},
            steps,
            manifest.inputs,
            pipeline.size_ids(shape),
            manifest.adapters,
            manifest.image_prompt,
            (len(manifest.controls), 3, *pipeline.picture_size(shape)),
        )
        claimed = [
            latents.claim(
                table,
                seed,
                one.guidance_scale or scale,
                [embeddings[text] for text in ([prompt, ""] if is_guided else [prompt])],
                adapters=self._adapters,
                controls=one.controls,
                image_prompt=self._image_prompt(one),
                masked_image=self._masked_image(one, seed),
            )
            for prompt, seed, one in zip(prompts, seeds, conditions or [Conditions()] * count, strict=True)
        ]
        slots = np.array(claimed, np.intp)
        rows = np.concatenate([slots, slots]) if is_guided else slots
        parts = np.repeat(np.array([COND, UNCOND] if is_guided else [COND], np.intp), count)
        stable: dict[str, Array] = {}
        for step in range(table.num_steps):
            given = latents.rows(rows, parts, np.full(len(rows), step, np.intp))
            if not stable:  # copied once: who keeps the inputs of all steps has them once too
                stable = {name: of.array() for name, of in given.items() if isinstance(of, StableRows)}
            inputs = stable | {name: of for name, of in given.items() if not isinstance(of, StableRows)}
            watch(inputs)
            latents.put(rows, parts, (denoiser or self.denoiser)(inputs)["prediction"])
            latents.advance(slots, np.full(count, step, np.intp))
        return self._calls[Component.DECODER]({"latent": decoder_latent(pipeline, latents.latent(slots))})["image"]

    def _is_guided(self, scale: float) -> bool:
        """Whether a step of a picture has a row without its prompt."""
        return scale > 1 and not self._pipeline.manifest.is_guidance_distilled

    def _embeddings(self, texts: Sequence[str]) -> Mapping[str, Embedding]:
        """What the text encoder makes of each text; each is encoded once."""
        encode = self._calls[Component.TEXT_ENCODER]
        text_room = self._pipeline.manifest.text_adapters
        nothing = {} if text_room is None else prompt_inputs(text_room, [()])  # adapters change the denoiser alone here
        ids = {text: np.array([self._tokenizer.encode(text).ids]) for text in dict.fromkeys(texts)}
        once = {text: encode({"input_ids": at, **nothing}) for text, at in ids.items()}
        names = self._pipeline.embedding_outputs
        return {text: {name: made[name][0] for name in names} for text, made in once.items()}

    def _image_prompt(self, given: Conditions) -> RowImagePrompt | None:
        if given.image_prompt is None:
            return None
        made = self._calls[Component.IMAGE_ENCODER]({"image": encoder_image(given.image_prompt)[None]})
        return RowImagePrompt(np.concatenate([made[name] for name in IMAGE_PROMPT_OUTPUTS]), 1.0)

    def _masked_image(self, given: Conditions, seed: int) -> RowMaskedImage | None:
        if given.init_image is None or given.mask is None:
            return None
        image = InitImage("", given.init_image, given.mask)
        encoded = self._calls[Component.ENCODER]({"image": encoder_image(given.init_image, given.mask)[None]})
        return image.masked_image(self._pipeline, {name: values[0] for name, values in encoded.items()}, seed)
