"""The tensors of running outputs of one batch key: gather a batch, put its results back, step.

The tensors lie in arrays with a slot per running output, so that a batch costs a few
array operations however many outputs share it. The scheduler decides which outputs
are in a batch; `sampler` has the arithmetic. Invariants: a slot is reused only when
no batch in flight reads or writes it; one slot never changes the bits of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safelight_server.catalog.manifest import (
    ADAPTER_SCALES_SOURCE,
    ADAPTER_WEIGHTS_SOURCE,
    CONTROL_IMAGES_SOURCE,
    CONTROL_SCALES_SOURCE,
    ENCODER_SOURCE,
    GUIDANCE_SOURCE,
    IMAGE_PROMPT_SCALE_SOURCE,
    IMAGE_PROMPT_TOKENS_SOURCE,
    LATENT_SOURCE,
    MASK_SOURCE,
    MASKED_IMAGE_SOURCE,
    SIZE_IDS_SOURCE,
    STABLE_DIFFUSION_INPUTS,
    TIMESTEP_SOURCE,
    AdapterRoom,
    ImagePromptRoom,
)
from safelight_server.domain.picture import Pixels
from safelight_server.domain.tensors import Array, Embedding, FloatArray
from safelight_server.engine.adapters import VERSIONS, RowAdapter, adapter_scales, adapter_weights, joined
from safelight_server.runtime.base import StableRows
from safelight_server.sampler import (
    INITIAL,
    STEP,
    SamplerTable,
    advance,
    gaussian,
    guide,
    keep_outside,
    noised,
    rescale,
)

Slots = npt.NDArray[np.intp]
COND, UNCOND = 0, 1
NUM_COEFFICIENTS = 6
BLOCK_BYTES = 256 << 10
"""Bytes of latents that are stepped together, so that intermediate arrays stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of an output after a step. With its table and seed this is all that is needed to continue.

    Attributes:
        step: steps made.
        x: the latent after them, (C, h, w) float32.
        denoised: the newest estimate of the clean latent, (C, h, w) float32.
    """

    step: int
    x: FloatArray
    denoised: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class CleanLatent:
    """The latent of a picture that an output starts from.

    Attributes:
        clean: the latent without noise, (C, h, w) float32.
        mask: (h, w) float32: 1 where it is developed anew, 0 where it is kept; None: 1 everywhere.
    """

    clean: FloatArray
    mask: FloatArray | None


@dataclass(frozen=True, slots=True, eq=False)
class RowMaskedImage:
    """What an inpainting denoiser is given of a picture for the rows of an output.

    Attributes:
        mask: (1, h, w) float32: 1 where it is developed anew, 0 where it is kept.
        latent: of the picture without the part that is developed anew, (C, h, w) float32.
    """

    mask: FloatArray
    latent: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class RowControl:
    """A control network that acts on the rows of an output.

    Attributes:
        place: of the network among those of the denoiser (`Manifest.controls`).
        pixels: (H, W, 3) uint8 sRGB, the picture that it is given.
        scale: factor of what it adds in `steps`; in all others it is 0.
        steps: counted from 0.
    """

    place: int
    pixels: Pixels
    scale: float
    steps: range


@dataclass(frozen=True, slots=True)
class RowImagePrompt:
    """What the denoiser is given of an image prompt for the rows of an output.

    Attributes:
        tokens: (2, T, D) float32: of the rows with the prompt, and of those with the negative prompt.
        scale: how much it counts.
    """

    tokens: FloatArray
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class _Inpainting:
    """The latent of a slot outside its mask: before step n the clean latent with the noise of `levels[n]`."""

    clean: FloatArray
    mask: FloatArray
    noise: FloatArray
    levels: FloatArray

    def kept(self, step: int) -> FloatArray:
        return noised(self.clean, self.noise, self.levels[step])


class Latents:
    """Slots for the running outputs of one batch key.

    Args:
        capacity: number of slots, for outputs that run and for those that ended while their batch was in flight.
        shape: (C, h, w) of a latent.
        context_shapes: shapes of a prompt's embedding, by output of the text encoder.
        max_steps: steps of the longest table.
        inputs: the denoiser's inputs, each with its source (`Manifest.inputs`).
        size_ids: value of the inputs with that source, (6,).
        room: room of each row for adapters; None: the denoiser takes none.
        image_prompt_room: the form of image prompts; None: the denoiser takes none.
        pictures: (K, 3, H, W): shape of a row's pictures for K control networks.
    """

    def __init__(
        self,
        capacity: int,
        shape: tuple[int, int, int],
        context_shapes: Mapping[str, tuple[int, ...]],
        max_steps: int,
        inputs: Mapping[str, str] = STABLE_DIFFUSION_INPUTS,
        size_ids: FloatArray | None = None,
        room: AdapterRoom | None = None,
        image_prompt_room: ImagePromptRoom | None = None,
        pictures: tuple[int, ...] = (0, 3, 0, 0),
    ) -> None:
        self.shape = shape
        self._inputs = inputs
        self._size_ids = size_ids
        self._room = room
        self._adapters: dict[int, Sequence[RowAdapter]] = {}
        self._adapter_versions = np.zeros(capacity, np.int64)
        self._pictures = pictures
        self._controls: dict[int, list[tuple[RowControl, FloatArray]]] = {}  # each with its picture, (3, H, W)
        self._control_versions = np.zeros(capacity, np.int64)
        self._image_prompt_room = image_prompt_room
        self._image_prompts: dict[int, RowImagePrompt] = {}  # of the slots that have one
        self._image_prompt_versions = np.zeros(capacity * 2, np.int64)
        self._free = list(range(capacity))[::-1]
        self._in_flight = [0] * capacity
        self._abandoned: set[int] = set()
        self._x = np.zeros((capacity, *shape), np.float32)
        self._denoised = np.zeros_like(self._x)
        self._prediction = np.zeros((capacity, 2, *shape), np.float32)
        self._context = {
            name: np.zeros((capacity * 2, *context_shape), np.float32) for name, context_shape in context_shapes.items()
        }
        self._context_versions = np.zeros(capacity * 2, np.int64)
        self._coefficients = np.zeros((capacity, max_steps, NUM_COEFFICIENTS), np.float32)
        self._in_scale = np.zeros((capacity, max_steps), np.float32)
        self._timesteps = np.zeros((capacity, max_steps), np.float32)
        self._guidance = np.ones((capacity, max_steps), np.float32)
        self._is_distilled = GUIDANCE_SOURCE in inputs.values()
        self._given_guidance = np.ones(capacity, np.float32)
        self._rescale = np.zeros(capacity, np.float32)
        self._noise_seed: list[int | None] = [None] * capacity
        self._inpainting: dict[int, _Inpainting] = {}
        num_masked = capacity if MASK_SOURCE in inputs.values() else 0
        self._mask = np.zeros((num_masked, 1, *shape[1:]), np.float32)
        self._masked_image = np.zeros((num_masked, *shape), np.float32)

    @property
    def num_used(self) -> int:
        """Slots that are not free: of running outputs, and of ended outputs whose batch is in flight."""
        return len(self._in_flight) - len(self._free)

    def claim(
        self,
        table: SamplerTable,
        seed: int,
        guidance_scale: float,
        context: Sequence[Embedding],
        start: Snapshot | None = None,
        picture: CleanLatent | None = None,
        guided_steps: range | None = None,
        guidance_rescale: float = 0.0,
        adapters: Sequence[RowAdapter] = (),
        controls: Sequence[RowControl] = (),
        image_prompt: RowImagePrompt | None = None,
        masked_image: RowMaskedImage | None = None,
    ) -> int:
        """Takes a slot for an output, and fills it with fresh noise or with the state `start`.

        Args:
            guidance_scale: where it is an input of the denoiser it is given to it, and nothing is combined.
            context: the embeddings of the prompt and, with guidance, of the negative prompt.
            picture: the latent that it starts from instead of pure noise.
            guided_steps: the steps with guidance; the others need no prediction for the negative prompt. None: all.
            guidance_rescale: see `sampler.rescale`.
            adapters: together of at most the rank that the room has.
            controls: at most one for each network.
            image_prompt: None: its rows have none.
            masked_image: where the denoiser has inputs for it.
        """
        slot = self._free[-1]
        steps = table.num_steps
        assert (masked_image is not None) == bool(len(self._mask))  # else rows had that of an earlier output
        if masked_image is not None:
            self._mask[slot], self._masked_image[slot] = masked_image.mask, masked_image.latent
        self._coefficients[slot, :steps] = table.coefficients
        self._in_scale[slot, :steps] = table.in_scale
        self._timesteps[slot, :steps] = table.timesteps
        self._guidance[slot, :steps] = 1.0
        guided = range(steps) if guided_steps is None else guided_steps
        if not self._is_distilled:  # else the network does what guidance does
            self._guidance[slot, guided.start : guided.stop] = guidance_scale
        self._given_guidance[slot] = guidance_scale
        self._rescale[slot] = guidance_rescale
        first = slot * 2
        self._adapters[slot] = adapters
        self._adapter_versions[slot] = next(VERSIONS) if adapters else 0
        self._controls[slot] = [(control, _planes(control.pixels)) for control in controls]
        self._control_versions[slot] = next(VERSIONS) if controls else 0
        self._image_prompt_versions[first : first + 2] = 0
        self._image_prompts.pop(slot, None)  # of an output that failed to begin here
        if image_prompt is not None:
            self._image_prompts[slot] = image_prompt
            self._image_prompt_versions[first : first + 2] = next(VERSIONS), next(VERSIONS)
        self._noise_seed[slot] = seed if table.uses_noise else None
        for name, rows in self._context.items():
            rows[first : first + len(context)] = [embedding[name] for embedding in context]
        self._context_versions[first : first + 2] = next(VERSIONS), next(VERSIONS)
        noise = gaussian(seed, INITIAL, 0, self.shape) if start is None or picture is not None else None
        if start is not None:
            self._x[slot] = start.x
            self._denoised[slot] = start.denoised
        else:
            assert noise is not None
            self._x[slot] = _first(table, noise, picture)
            self._denoised[slot] = 0.0
        if picture is not None and picture.mask is not None:
            assert noise is not None
            self._inpainting[slot] = _Inpainting(picture.clean, picture.mask, noise, table.levels)
        self._free.pop()
        return slot

    def release(self, slot: int) -> None:
        """Frees a slot, or lets `arrive` free it if a batch in flight uses it."""
        self._inpainting.pop(slot, None)
        self._adapters.pop(slot, None)
        self._controls.pop(slot, None)
        self._image_prompts.pop(slot, None)
        if self._in_flight[slot]:
            self._abandoned.add(slot)
        else:
            self._free.append(slot)

    def depart(self, slots: Slots) -> None:
        """Marks the slots (one entry per row) of a batch that goes to a runtime."""
        for slot in slots.tolist():
            self._in_flight[slot] += 1

    def arrive(self, slots: Slots) -> None:
        """Unmarks the slots of a batch that is back, with or without results."""
        for slot in slots.tolist():
            self._in_flight[slot] -= 1
            if not self._in_flight[slot] and slot in self._abandoned:
                self._abandoned.remove(slot)
                self._free.append(slot)

    def rows(self, slots: Slots, parts: Slots, steps: Slots) -> dict[str, Array | StableRows]:
        """Denoiser inputs for one row per entry: the output's slot, cond or uncond, and its step."""
        context = slots * 2 + parts
        return {name: self._input(source, slots, context, steps) for name, source in self._inputs.items()}

    def _input(self, source: str, slots: Slots, context: Slots, steps: Slots) -> Array | StableRows:
        if source == LATENT_SOURCE:
            scaled: FloatArray = self._x[slots] * self._in_scale[slots, steps][:, None, None, None]
            return scaled
        if source == TIMESTEP_SOURCE:
            timesteps: FloatArray = self._timesteps[slots, steps]
            return timesteps
        if source == GUIDANCE_SOURCE:
            given: FloatArray = self._given_guidance[slots]
            return given
        if source == MASK_SOURCE:
            mask: FloatArray = self._mask[slots]
            return mask
        if source == MASKED_IMAGE_SOURCE:
            masked: FloatArray = self._masked_image[slots]
            return masked
        if source == SIZE_IDS_SOURCE:
            assert self._size_ids is not None
            return np.tile(self._size_ids, (len(slots), 1))
        if source == ADAPTER_WEIGHTS_SOURCE:
            assert self._room is not None
            return adapter_weights(self._room, self._adapter_versions[slots], self._adapters_of(slots))
        if source == ADAPTER_SCALES_SOURCE:
            assert self._room is not None
            return adapter_scales(self._room, self._adapters_of(slots))
        if source == CONTROL_IMAGES_SOURCE:
            return self._control_images(slots)
        if source == CONTROL_SCALES_SOURCE:
            return self._control_scales(slots, steps)
        if source == IMAGE_PROMPT_TOKENS_SOURCE:
            return self._image_prompt_tokens(slots, context)
        if source == IMAGE_PROMPT_SCALE_SOURCE:
            prompts = [self._image_prompts.get(slot) for slot in slots.tolist()]
            return np.array([0.0 if prompt is None else prompt.scale for prompt in prompts], np.float32)
        rows = self._context[source.removeprefix(ENCODER_SOURCE)]
        return StableRows(rows.shape[1:], self._context_versions[context], lambda at: rows[context[at]])

    def _adapters_of(self, slots: Slots) -> list[Sequence[RowAdapter]]:
        return [self._adapters[slot] for slot in slots.tolist()]

    def _control_images(self, slots: Slots) -> StableRows:
        """The pictures of each row for the control networks, (B, K, 3, H, W); zeros where it has none.

        In steps in which a network does not act its picture stays there, so that it need not be copied again later:
        what a network with the scale 0 is given is not read.
        """
        pieces = [
            [(control.place, planes[np.newaxis]) for control, planes in self._controls[slot]] for slot in slots.tolist()
        ]
        return joined(self._pictures, self._control_versions[slots], pieces)

    def _control_scales(self, slots: Slots, steps: Slots) -> FloatArray:
        """The factors of what the control networks add to each row, (B, K); 0 for those that do not act."""
        scales = np.zeros((len(slots), self._pictures[0]), np.float32)
        for row, (slot, step) in enumerate(zip(slots.tolist(), steps.tolist(), strict=True)):
            for control, _ in self._controls[slot]:
                if step in control.steps:
                    scales[row, control.place] = control.scale
        return scales

    def _image_prompt_tokens(self, slots: Slots, context: Slots) -> StableRows:
        """The tokens of each row's image prompt, zeros where it has none, (B, T, D)."""
        assert self._image_prompt_room is not None
        prompts = [self._image_prompts.get(slot) for slot in slots.tolist()]
        parts = (context - slots * 2).tolist()
        pieces = [
            [] if prompt is None else [(0, prompt.tokens[part])] for prompt, part in zip(prompts, parts, strict=True)
        ]
        room = self._image_prompt_room
        return joined((room.num_tokens, room.width), self._image_prompt_versions[context], pieces)

    def put(self, slots: Slots, parts: Slots, prediction: FloatArray) -> None:
        """Stores the predictions (B, C, h, w) of rows until all rows of their steps are back."""
        self._prediction[slots, parts] = prediction

    def advance(self, slots: Slots, steps: Slots) -> npt.NDArray[np.bool_]:
        """Makes one sampler step for each slot, in blocks of slots that fit into the processor's cache.

        Returns:
            For each slot whether its new latent is finite.
        """
        at_once = max(1, BLOCK_BYTES // self._x[0].nbytes)
        blocks = [slice(first, first + at_once) for first in range(0, len(slots), at_once)]
        return np.concatenate([self._advance(slots[block], steps[block]) for block in blocks])

    def _advance(self, slots: Slots, steps: Slots) -> npt.NDArray[np.bool_]:
        prediction = self._prediction[slots, COND]
        scale = self._guidance[slots, steps]
        guided = np.flatnonzero(scale != 1.0)
        if guided.size:
            at, cond = slots[guided], prediction[guided]
            combined = guide(cond, self._prediction[at, UNCOND], scale[guided])
            prediction[guided] = rescale(combined, cond, self._rescale[at])
        x, denoised = advance(
            self._x[slots],
            prediction,
            self._denoised[slots],
            self._noise(slots, steps),
            self._coefficients[slots, steps],
        )
        for row, (slot, step) in enumerate(zip(slots.tolist(), steps.tolist(), strict=True)):
            if (inpainting := self._inpainting.get(slot)) is not None:
                x[row] = keep_outside(x[row], inpainting.kept(step + 1), inpainting.mask)
        self._x[slots] = x
        self._denoised[slots] = denoised
        return np.array([bool(np.isfinite(row).all()) for row in x])

    def _noise(self, slots: Slots, steps: Slots) -> FloatArray | None:
        seeds = [self._noise_seed[slot] for slot in slots.tolist()]
        if all(seed is None for seed in seeds):
            return None
        noise = np.zeros((len(slots), *self.shape), np.float32)
        for row, (seed, step) in enumerate(zip(seeds, steps.tolist(), strict=True)):
            if seed is not None:
                noise[row] = gaussian(seed, STEP, step, self.shape)
        return noise

    def latent(self, slots: Slots) -> FloatArray:
        """The latents of these slots, (B, C, h, w), copied."""
        return np.array(self._x[slots])

    def denoised(self, slot: int) -> FloatArray:
        """The newest estimate of a slot's clean latent, (C, h, w), copied."""
        return np.array(self._denoised[slot])

    def snapshot(self, slot: int, step: int) -> Snapshot:
        """A copy of the state of the output in `slot` after `step` steps."""
        return Snapshot(step, self._x[slot].copy(), self._denoised[slot].copy())


def _first(table: SamplerTable, noise: FloatArray, picture: CleanLatent | None) -> FloatArray:
    """The latent before the first step. With a mask and a strength of 1 it is pure noise."""
    if picture is None or (picture.mask is not None and table.first_step == 0):
        return np.float32(table.init_scale) * noise
    return noised(picture.clean, noise, table.levels[table.first_step])


def _planes(pixels: Pixels) -> FloatArray:
    """A picture (H, W, 3) as control networks take it, (3, H, W) in [0, 1]: made once, not in each step."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) / np.float32(255))
