"""The tensors of all outputs in flight: gathers the inputs of a batch, and puts its results back.

`engine.py` runs the batches; the scheduler decides which rows are in them.
Invariant: an output that has ended leaves nothing behind here, except a slot
that a batch in flight still reads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from safelight_server.catalog.manifest import IMAGE_PROMPT_OUTPUTS
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.catalog.pixels import decoder_latent, encoder_image
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Embedding, FloatArray
from safelight_server.engine.adapters import RowAdapter, prompt_inputs
from safelight_server.engine.jobs import AdaptedPrompt, EncoderInput, InitImage, MaskedPicture
from safelight_server.engine.latents import Latents, RowControl, RowImagePrompt, Slots, Snapshot
from safelight_server.runtime.base import Inputs
from safelight_server.sampler import SamplerTable
from safelight_server.scheduler import Batch, Kind, Row
from safelight_server.telemetry import Stage, Trail
from safelight_server.telemetry.trail import NO_CALL, Attributes, CallSpans, PreviewSpan, TracedOutput

PART_NAMES = {Kind.ENCODE: "text_encode", Kind.DENOISE: "step", Kind.DECODE: "decode", Kind.PREVIEW: "decode"}
"""Name of the span that each trace has for its part of a batch."""


@dataclass(frozen=True, slots=True)
class BatchKey:
    """The properties that rows must have in common to share a call. The scheduler uses its string."""

    pipeline: Pipeline
    component: Component
    latent_shape: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.pipeline.name}/{self.component.value}/{'x'.join(map(str, self.latent_shape))}"


@dataclass(slots=True)
class OutputTensors:
    """The tensors of one output.

    Attributes:
        conditioning: ids of its embeddings: the prompt's, with guidance the negative prompt's, and the image prompt's
            if it has one.
        init_image: the picture that it starts from; None: it starts from noise, or from `start` alone.
        masked_image: the picture of which an inpainting denoiser is given what its mask keeps.
        guided_steps: the steps with guidance; None: all.
        embeddings: its embeddings that are known already, by id.
        key: the key of its denoiser batches.
        slot: its slot in the latents of its key, once it takes steps.
        image: the decoded picture, (3, H, W).
        image_prompt_scale: how much its image prompt counts; 0: it has none.
    """

    pipeline: Pipeline
    latent_shape: tuple[int, int, int]
    table: SamplerTable
    seed: int
    guidance_scale: float
    conditioning: tuple[str, ...]
    embeddings: Mapping[str, Embedding]
    start: Snapshot | None
    step: int
    key: str
    init_image: InitImage | None = None
    guided_steps: range | None = None
    guidance_rescale: float = 0.0
    adapters: Sequence[RowAdapter] = ()
    controls: Sequence[RowControl] = ()
    slot: int | None = None
    image: FloatArray | None = None
    image_prompt_scale: float = 0.0
    masked_image: InitImage | None = None


@dataclass(slots=True)
class PendingPreview:
    """A denoised latent (C, h, w) that waits to be decoded for a preview."""

    latent: FloatArray
    image: asyncio.Future[FloatArray | None]
    stage: Stage

    def answer(self, image: FloatArray | None) -> None:
        """Sets the image for the stream that waits, if it still does. None: the latent will not be decoded."""
        if not self.image.done():
            self.image.set_result(image)


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """The inputs of a batch. Denoiser calls also have by row its slot, and whether it is the cond or the uncond row."""

    key: BatchKey
    inputs: Inputs
    num_outputs: int
    slots: Slots | None = None
    parts: Slots | None = None
    previews: Sequence[PendingPreview] = ()


class Batches:
    """Gathers batches from, and puts their results back into, the outputs in flight.

    Args:
        capacity: outputs that may hold latents of one key at once.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.outputs: dict[int, OutputTensors] = {}
        self.keys: dict[str, BatchKey] = {}
        self.encoder_inputs: dict[str, EncoderInput] = {}
        self._embeddings: dict[str, Embedding] = {}
        self._latents: dict[str, Latents] = {}
        self._departed: set[int] = set()
        self._previews: dict[int, dict[str, PendingPreview]] = {}  # by output and key; also of outputs elsewhere

    @property
    def num_latents(self) -> int:
        """Slots of latents in use, of all keys."""
        return sum(latents.num_used for latents in self._latents.values())

    def gather(self, batch: Batch) -> PreparedCall:
        """Collects the inputs of a batch."""
        key = self.keys[batch.key]
        if batch.kind is Kind.ENCODE:
            given = [self.encoder_inputs[row.conditioning_id] for row in batch.rows]
            if key.component in (Component.ENCODER, Component.IMAGE_ENCODER):
                return PreparedCall(key, {"image": np.stack([_encoder_row(one) for one in given])}, 0)
            return PreparedCall(key, _prompt_rows(key.pipeline, given), 0)
        if batch.kind is Kind.DENOISE:
            return self._gather_steps(batch, key)
        if batch.kind is Kind.DECODE:
            latent = np.stack([self._finished(self.outputs[row.output_id]) for row in batch.rows])
            return PreparedCall(key, {"latent": decoder_latent(key.pipeline, latent)}, len(batch.rows))
        previews = [self._previews[row.output_id][batch.key] for row in batch.rows]
        latent = np.stack([preview.latent for preview in previews])
        for row in batch.rows:
            del self._previews[row.output_id][batch.key]
        return PreparedCall(key, {"latent": decoder_latent(key.pipeline, latent)}, len(batch.rows), previews=previews)

    def spans(
        self, batch: Batch, call: PreparedCall, runtime: str, trails: Callable[[int], Sequence[Trail]]
    ) -> AbstractContextManager[object]:
        """A context manager that records the batch in the traces of the outputs and previews that it serves."""
        served = self._served(batch, call, trails)
        attributes = {
            "safelight.model": call.key.pipeline.name,
            "safelight.component": call.key.component.value,
            "safelight.runtime": runtime,
            "safelight.instance": batch.instance,
            "safelight.batch.rows": len(batch.rows),
            "safelight.batch.outputs": len(batch.members),
        }
        return CallSpans(PART_NAMES[batch.kind], served, attributes) if served else NO_CALL

    def _served(
        self, batch: Batch, call: PreparedCall, trails: Callable[[int], Sequence[Trail]]
    ) -> list[tuple[TracedOutput, Attributes]]:
        """The traced outputs and previews in a batch, each with the attributes of its span."""
        if batch.kind is Kind.PREVIEW:
            recorded = [preview.stage for preview in call.previews if preview.stage.recorded]
            return [(PreviewSpan(stage), {"safelight.rows": 1}) for stage in recorded]
        if batch.kind is Kind.ENCODE:
            encoded = set(batch.members)
            rows = {
                output_id: len(encoded.intersection(output.conditioning)) for output_id, output in self.outputs.items()
            }
        else:
            rows = dict(Counter(row.output_id for row in batch.rows))
        steps = {row.output_id: row.step + 1 for row in batch.rows} if batch.kind is Kind.DENOISE else {}
        served: list[tuple[TracedOutput, Attributes]] = []
        for output_id, count in rows.items():
            step = {"safelight.step": steps[output_id]} if output_id in steps else {}
            attributes = {"safelight.rows": count, **step}
            served += [(trail, attributes) for trail in (trails(output_id) if count else ())]
        return served

    def returned(self, batch: Batch, call: PreparedCall) -> None:
        """Notes that the runtime no longer reads the inputs of a batch. Later calls for the same batch do nothing."""
        if call.slots is not None and batch.batch_id in self._departed:
            self._departed.remove(batch.batch_id)
            self._latents[batch.key].arrive(call.slots)

    def keep(self, batch: Batch, call: PreparedCall, results: Mapping[str, FloatArray]) -> None:
        """Stores the results of a batch for the next stage. Results of outputs that have ended are dropped."""
        if batch.kind is Kind.ENCODE:
            for row, embedding in zip(batch.rows, _embeddings(call.key, results), strict=True):
                if row.conditioning_id in self.encoder_inputs:
                    self._embeddings[row.conditioning_id] = embedding
        elif batch.kind is Kind.DENOISE:
            assert call.slots is not None and call.parts is not None
            self._latents[batch.key].put(call.slots, call.parts, results["prediction"])
        elif batch.kind is Kind.DECODE:
            for row, image in zip(batch.rows, results["image"], strict=True):
                if (output := self.outputs.get(row.output_id)) is not None:
                    output.image = image
        else:
            for preview, image in zip(call.previews, results["image"], strict=True):
                preview.answer(image)

    def lost(self, call: PreparedCall) -> None:
        """Gives up the previews of a failed batch: they are not tried again."""
        for preview in call.previews:
            preview.answer(None)

    def advance(self, output_ids: Sequence[int]) -> list[int]:
        """Makes one sampler step for outputs of one key.

        Returns:
            The outputs whose latents are not finite any more.
        """
        outputs = [self.outputs[output_id] for output_id in output_ids]
        slots = np.array([output.slot for output in outputs], np.intp)
        steps = np.array([output.step for output in outputs], np.intp)
        finite = self._latents_of(output_ids[0]).advance(slots, steps)
        for output in outputs:
            output.step += 1
        return [output_id for output_id, good in zip(output_ids, finite.tolist(), strict=True) if not good]

    def denoised(self, output_id: int) -> FloatArray:
        """The newest estimate of an output's clean latent, (C, h, w), copied."""
        slot = self.outputs[output_id].slot
        assert slot is not None
        return self._latents_of(output_id).denoised(slot)

    def want_preview(
        self, output_id: int, key: str, latent: FloatArray, stage: Stage
    ) -> asyncio.Future[FloatArray | None]:
        """Keeps a latent (C, h, w) for the next decoder batch of a key. Replaces an older one of the same output.

        Returns:
            A future of the image (3, H, W); its result is None if the latent will not be decoded.
        """
        previews = self._previews.setdefault(output_id, {})
        if (older := previews.get(key)) is not None:
            older.answer(None)
        preview = previews[key] = PendingPreview(latent, asyncio.get_running_loop().create_future(), stage)
        return preview.image

    def drop_previews(self, output_id: int) -> None:
        """Gives up the previews of an output that are not in a batch yet."""
        for preview in self._previews.pop(output_id, {}).values():
            preview.answer(None)

    def snapshot(self, output_id: int) -> Snapshot | None:
        """The state from which an output can continue later; None if it has made no step."""
        output = self.outputs[output_id]
        if output.slot is None:
            return output.start
        return self._latents_of(output_id).snapshot(output.slot, output.step)

    def embedding(self, conditioning_id: str) -> Embedding:
        """An embedding that an output or a call of `Engine.encode` needs."""
        return self._embeddings[conditioning_id]

    def release(self, conditioning_id: str) -> None:
        """Frees an embedding that nothing needs any more."""
        self.encoder_inputs.pop(conditioning_id, None)
        self._embeddings.pop(conditioning_id, None)

    def forget(self, output_id: int) -> None:
        """Frees the tensors of an output that has ended."""
        output = self.outputs.pop(output_id)
        if output.slot is not None:
            self._latents[output.key].release(output.slot)
        self.drop_previews(output_id)

    def key(self, pipeline: Pipeline, component: Component, latent_shape: tuple[int, int, int]) -> str:
        """The key of rows that can share a call, as a string for the scheduler."""
        key = BatchKey(pipeline, component, latent_shape)
        name = str(key)
        self.keys.setdefault(name, key)
        return name

    def _latents_of(self, output_id: int) -> Latents:
        return self._latents[self.outputs[output_id].key]

    def _finished(self, output: OutputTensors) -> FloatArray:
        """The latent (C, h, w) after the last step, which may have been made before a suspension."""
        if output.slot is not None:
            latent: FloatArray = self._latents[output.key].latent(np.array([output.slot]))[0]
            return latent
        assert output.start is not None
        return output.start.x

    def _slots(self, rows: Sequence[Row]) -> Slots:
        return np.array([self.outputs[row.output_id].slot for row in rows], np.intp)

    def _gather_steps(self, batch: Batch, key: BatchKey) -> PreparedCall:
        for row in batch.rows:
            if self.outputs[row.output_id].slot is None:
                self._claim(batch.key, self.outputs[row.output_id])
        slots = self._slots(batch.rows)
        parts = np.array([row.part for row in batch.rows], np.intp)
        steps = np.array([row.step for row in batch.rows], np.intp)
        latents = self._latents[batch.key]
        inputs = latents.rows(slots, parts, steps)
        latents.depart(slots)
        self._departed.add(batch.batch_id)
        return PreparedCall(key, inputs, len({row.output_id for row in batch.rows}), slots, parts)

    def _claim(self, key: str, output: OutputTensors) -> None:
        known = output.embeddings
        context = [known[i] if i in known else self._embeddings[i] for i in output.conditioning]
        image_prompt = None
        if output.image_prompt_scale:
            of_image = context.pop()
            tokens = np.stack([of_image[name] for name in IMAGE_PROMPT_OUTPUTS])
            image_prompt = RowImagePrompt(tokens, output.image_prompt_scale)
        if key not in self._latents:
            pipeline, shape = output.pipeline, output.latent_shape
            steps, inputs = pipeline.manifest.limits.max_num_inference_steps, pipeline.manifest.inputs
            context_shapes = {name: context[0][name].shape for name in pipeline.embedding_outputs}
            rooms = pipeline.manifest.adapters, pipeline.manifest.image_prompt
            pictures = len(pipeline.manifest.controls), 3, *pipeline.picture_size(shape)
            self._latents[key] = Latents(
                self._capacity, shape, context_shapes, steps, inputs, pipeline.size_ids(shape), *rooms, pictures
            )
        picture = None
        if (image := output.init_image) is not None:
            encoding = self._embeddings[image.name(output.pipeline)]
            picture = image.clean_latent(output.pipeline, encoding, output.seed)
        masked = None
        if (image := output.masked_image) is not None:
            encoding = self._embeddings[image.masked_name(output.pipeline)]
            masked = image.masked_image(output.pipeline, encoding, output.seed)
        output.slot = self._latents[key].claim(
            output.table,
            output.seed,
            output.guidance_scale,
            context,
            output.start,
            picture,
            output.guided_steps,
            output.guidance_rescale,
            output.adapters,
            output.controls,
            image_prompt,
            masked,
        )


def _prompt_rows(pipeline: Pipeline, given: Sequence[EncoderInput]) -> Inputs:
    """The text encoder's inputs for prompts with adapters and without."""
    ids = [one.token_ids if isinstance(one, AdaptedPrompt) else one for one in given]
    inputs: Inputs = {"input_ids": np.array(ids, np.int64)}
    if (room := pipeline.manifest.text_adapters) is None:
        return inputs
    return {**inputs, **prompt_inputs(room, [one.adapters if isinstance(one, AdaptedPrompt) else () for one in given])}


def _encoder_row(given: EncoderInput) -> FloatArray:
    """A picture, or what its mask keeps of it, as an encoder takes it, (3, H, W)."""
    if isinstance(given, MaskedPicture):
        return encoder_image(given.pixels, given.mask)
    return encoder_image(np.asarray(given))


def _embeddings(key: BatchKey, results: Mapping[str, FloatArray]) -> list[Embedding]:
    """The outputs of an encoder for each row."""
    names: Sequence[str] = [name for name in ("mean", "std") if name in results]
    if key.component is Component.TEXT_ENCODER:
        names = key.pipeline.embedding_outputs
    elif key.component is Component.IMAGE_ENCODER:
        names = IMAGE_PROMPT_OUTPUTS
    return [dict(zip(names, row, strict=True)) for row in zip(*(results[name] for name in names), strict=True)]
