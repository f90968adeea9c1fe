"""A job: what the engine needs to know to develop one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from safelight_server.catalog.pipeline import Pipeline
from safelight_server.catalog.pixels import denoiser_latent, sampled_mask, shrunk_mask, to_pixels
from safelight_server.domain.component import Component
from safelight_server.domain.picture import Pixels, scaled
from safelight_server.domain.tensors import Embedding, FloatArray
from safelight_server.engine.adapters import PromptAdapter, RowAdapter, prompt_adapters
from safelight_server.engine.latents import CleanLatent, RowControl, RowMaskedImage, Snapshot
from safelight_server.sampler import POSTERIOR, SamplerTable, gaussian
from safelight_server.scheduler import Kind, Priority, ScheduledOutput

COMPONENTS = {
    Kind.ENCODE: Component.TEXT_ENCODER,
    Kind.DENOISE: Component.DENOISER,
    Kind.DECODE: Component.DECODER,
}


@dataclass(frozen=True, slots=True, eq=False)
class MaskedPicture:
    """A picture of which is encoded what its mask keeps: `pixels` (H, W, 3) and `mask` (H, W), uint8."""

    pixels: Pixels
    mask: Pixels


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedPrompt:
    """Token ids (T,), and the adapters that change the text encoder for them; at least one."""

    token_ids: tuple[int, ...]
    adapters: tuple[PromptAdapter, ...]


EncoderInput = tuple[int, ...] | AdaptedPrompt | Pixels | MaskedPicture
"""The input of an encoder: token ids (T,), also with adapters, the pixels of a picture (H, W, 3), or a part of one."""
WHOLE, WITHOUT_PART = 0, 1
"""By what is encoded of an init image the counter of its noise: two encodings of an output have independent noise."""


@dataclass(frozen=True, slots=True, eq=False)
class InitImage:
    """A picture that outputs start from, at their size.

    Attributes:
        digest: equal for pictures whose pixels are equal.
        pixels: (H, W, 3) uint8 sRGB.
        mask: (H, W) uint8: 255 where it is developed anew, 0 where it is kept; None: 255 everywhere.
        mask_digest: equal for masks whose pixels are equal; "": there is none.
    """

    digest: str
    pixels: Pixels
    mask: Pixels | None = None
    mask_digest: str = ""

    def name(self, pipeline: Pipeline) -> str:
        """The name of its encoding, equal for equal encodings."""
        height, width, _ = self.pixels.shape
        return f"{pipeline.component_digest(Component.ENCODER)}:{self.digest}:{width}x{height}"

    def clean_latent(self, pipeline: Pipeline, encoding: Embedding, seed: int) -> CleanLatent:
        """Its latent for an output.

        Args:
            encoding: `mean` and, where the encoder gives one, `std`, (C, h, w).
        """
        latent = _encoded(pipeline, encoding, seed, WHOLE)
        # An inpainting denoiser keeps the rest of the picture itself, as it was trained to do.
        mask = None if pipeline.manifest.is_inpainting else self.mask
        return CleanLatent(latent, None if mask is None else shrunk_mask(mask, latent.shape[1:]))

    def masked_name(self, pipeline: Pipeline) -> str:
        """The name of the encoding of what its mask keeps of it."""
        return f"{self.name(pipeline)}:without:{self.mask_digest}"

    def without_part(self) -> MaskedPicture:
        """What its mask keeps of it, for the encoder."""
        assert self.mask is not None
        return MaskedPicture(self.pixels, self.mask)

    def masked_image(self, pipeline: Pipeline, encoding: Embedding, seed: int) -> RowMaskedImage:
        """What an inpainting denoiser is given of it for an output.

        Args:
            encoding: of `without_part`: `mean` and, where the encoder gives one, `std`, (C, h, w).
        """
        assert self.mask is not None
        latent = _encoded(pipeline, encoding, seed, WITHOUT_PART)
        return RowMaskedImage(sampled_mask(self.mask, latent.shape[1:]), latent)

    def finish(self, pixels: Pixels) -> Pixels:
        """The picture to show: outside the mask it has the pixels of the picture that it started from.

        Args:
            pixels: (H, W, 3) uint8; a preview may be smaller, and mask and picture are then scaled to its size.
        """
        if self.mask is None:
            return pixels
        mask, kept = self.mask, self.pixels
        if pixels.shape != kept.shape:
            height, width, _ = pixels.shape
            mask, kept = scaled(mask, width, height), scaled(kept, width, height)
        share = (mask.astype(np.float32) / 255)[..., None]
        return np.round(share * pixels + (1 - share) * kept).astype(np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class ImagePrompt:
    """A picture that says what to draw beside the prompt.

    Attributes:
        digest: SHA-256 of its file in hexadecimal.
        pixels: (S, S, 3) uint8 sRGB, as the image encoder takes it.
        scale: how much it counts, above 0.
    """

    digest: str
    pixels: Pixels
    scale: float

    def name(self, pipeline: Pipeline) -> str:
        """The name of its encoding, equal for equal encodings."""
        return f"{pipeline.component_digest(Component.IMAGE_ENCODER)}:{self.digest}"


@dataclass(frozen=True, slots=True)
class Job:
    """One output to develop.

    Attributes:
        token_ids: token ids of the prompt and, with guidance, of the negative prompt; each (T,).
        deadline: on the engine's clock.
        start: the state to continue from after `suspend`, or to begin from instead of noise.
        embeddings: embeddings of `token_ids` and behind them of `image_prompt` that are known already; may be shorter.
        image: the picture that it starts from instead of noise. If `start` is set, only its mask is used.
        guided_steps: the steps with guidance; each of the others has one row. None: all, if it has guidance.
        guidance_rescale: see `sampler.rescale`.
        adapters: for all of its rows, and for its prompts.
        controls: of the denoiser, for all of its rows.
        image_prompt: what its rows are given beside their prompts.
    """

    output_id: int
    caller: str
    priority: Priority
    pipeline: Pipeline
    latent_shape: tuple[int, int, int]
    table: SamplerTable
    seed: int
    guidance_scale: float
    token_ids: tuple[tuple[int, ...], ...]
    deadline: float | None = None
    start: Snapshot | None = None
    embeddings: tuple[Embedding | None, ...] = ()
    image: InitImage | None = None
    guided_steps: range | None = None
    guidance_rescale: float = 0.0
    adapters: tuple[RowAdapter, ...] = ()
    controls: tuple[RowControl, ...] = ()
    image_prompt: ImagePrompt | None = None

    @property
    def first_step(self) -> int:
        """The first step that it makes, from 0."""
        return self.table.first_step if self.start is None else self.start.step

    def num_rows_skipped(self, steps: range) -> int:
        """Denoiser rows that steps (from 0) do not need, as they lie outside the guidance interval."""
        if self.guided_steps is None:
            return 0
        return (len(self.token_ids) - 1) * sum(step not in self.guided_steps for step in steps)

    @property
    def encoded_image(self) -> str:
        """The name of the encoding of its picture; "": it needs no encoding, or no longer."""
        if self.image is None:
            return ""
        if self.pipeline.manifest.is_inpainting:
            needed = self.start is None and self.first_step > 0  # else it begins from noise alone
        else:
            needed = self.start is None or self.image.mask is not None
        return self.image.name(self.pipeline) if needed else ""

    @property
    def encoded_masked_image(self) -> str:
        """The name of the encoding of what the mask keeps of its picture; "": its denoiser takes none."""
        if self.image is None or not self.pipeline.manifest.is_inpainting:
            return ""
        return self.image.masked_name(self.pipeline)

    @property
    def conditioning(self) -> tuple[str, ...]:
        """Names of its prompts, one per row of a step (`prompt_name`), and behind them that of its image prompt."""
        adapters = prompt_adapters(self.adapters)
        prompts = [prompt_name(self.pipeline, ids, adapters) for ids in self.token_ids]
        return (*prompts, *([] if self.image_prompt is None else [self.image_prompt.name(self.pipeline)]))

    @property
    def encoder_inputs(self) -> dict[str, EncoderInput]:
        """The encoder inputs of its embeddings, by name."""
        adapters = prompt_adapters(self.adapters)
        given: list[EncoderInput] = [AdaptedPrompt(ids, adapters) if adapters else ids for ids in self.token_ids]
        if self.image_prompt is not None:
            given.append(self.image_prompt.pixels)
        inputs = dict(zip(self.conditioning, given, strict=True))
        if self.image is not None and (name := self.encoded_image):
            inputs[name] = self.image.pixels
        if self.image is not None and (name := self.encoded_masked_image):
            inputs[name] = self.image.without_part()
        return inputs

    @property
    def known(self) -> dict[str, Embedding]:
        """Embeddings that are known already, by name."""
        pairs = zip(self.conditioning, self.embeddings, strict=False)
        return {name: embedding for name, embedding in pairs if embedding is not None}

    def finish(self, image: FloatArray) -> Pixels:
        """The finished picture (H, W, 3) of the decoded image (3, H, W). Slow: runs in a thread.

        Raises:
            NotFiniteError: a value is infinite or NaN.
        """
        pixels = to_pixels(image)
        return pixels if self.image is None else self.image.finish(pixels)

    def as_output(self, key: Callable[[Pipeline, Component, tuple[int, int, int]], str]) -> ScheduledOutput:
        """Converts the job to the scheduler's form. `key` returns the batch key of a component (`Batches.key`)."""
        known = self.known
        keys = {kind: key(self.pipeline, component, self.latent_shape) for kind, component in COMPONENTS.items()}
        conditioning = [name for name in self.conditioning if name not in known]
        pictures = filter(None, (self.encoded_image, self.encoded_masked_image))
        encoder_keys = {name: key(self.pipeline, Component.ENCODER, self.latent_shape) for name in pictures}
        if self.image_prompt is not None and (name := self.image_prompt.name(self.pipeline)) in conditioning:
            conditioning.remove(name)
            encoder_keys[name] = key(self.pipeline, Component.IMAGE_ENCODER, self.latent_shape)
        return ScheduledOutput(
            output_id=self.output_id,
            caller=self.caller,
            priority=self.priority,
            num_steps=self.table.num_steps,
            rows_per_step=len(self.token_ids),
            guided_steps=self.guided_steps,
            keys=keys,
            conditioning=(*conditioning, *encoder_keys),
            encoder_keys=encoder_keys,
            deadline=self.deadline,
            first_step=self.first_step,
        )


def _encoded(pipeline: Pipeline, encoding: Embedding, seed: int, what: int) -> FloatArray:
    """The denoiser's latent (C, h, w) of an encoded picture, drawn from its distribution where it has one."""
    latent = encoding["mean"]
    if "std" in encoding:
        latent = latent + encoding["std"] * gaussian(seed, POSTERIOR, what, latent.shape)
    return denoiser_latent(pipeline, latent)


def prompt_name(pipeline: Pipeline, token_ids: Sequence[int], adapters: Sequence[PromptAdapter] = ()) -> str:
    """The name of a prompt, equal for prompts with equal embeddings: the same adapters change the text encoder."""
    encoder = pipeline.component_digest(Component.TEXT_ENCODER)
    changes = "".join(f";{sha256}*{scale!r}" for sha256, scale in (adapter.key for adapter in adapters))
    return f"{encoder}:{','.join(map(str, token_ids))}{changes}"
