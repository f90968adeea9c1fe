"""The adapters (LoRA) that the rows of a call bring, as inputs of a network that has room for them (`AdapterRoom`).

The denoiser's rows bring what changes the denoiser, and the text encoder's rows, which are prompts, what changes that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safelight_server.catalog.manifest import AdapterRoom
from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.runtime.base import StableRows

VERSIONS = itertools.count(1)
"""Version numbers of the contents of rows (`StableRows`); 0 means none."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptAdapter:
    """What an adapter changes in the text encoder for the prompts of an output.

    Attributes:
        weights: (r, Q) float32, for the room of the text encoder.
        scale: factor of what it adds.
        sha256: digest of the adapter's file; equal for equal weights.
    """

    weights: FloatArray
    scale: float
    sha256: str

    @property
    def key(self) -> tuple[str, float]:
        """What decides an embedding beside the prompt."""
        return self.sha256, self.scale


@dataclass(frozen=True, slots=True, eq=False)
class RowAdapter:
    """An adapter that changes the denoiser for the rows of an output.

    Attributes:
        weights: (r, Q) float32, for the room of the denoiser.
        scale: factor of what it adds.
        text: what it changes in the text encoder; None: nothing.
    """

    weights: FloatArray
    scale: float
    text: PromptAdapter | None = None


def prompt_adapters(adapters: Iterable[RowAdapter]) -> tuple[PromptAdapter, ...]:
    """What adapters change in the text encoder; empty where the embeddings are those without adapters."""
    return tuple(adapter.text for adapter in adapters if adapter.text is not None)


def adapter_weights(
    room: AdapterRoom,
    versions: npt.NDArray[np.int64],
    rows: Sequence[Sequence[RowAdapter | PromptAdapter]],
) -> StableRows:
    """What each row's adapters add, one below the other, and zeros below them, (B, R, Q)."""
    pieces = []
    for adapters in rows:
        ends = itertools.accumulate(len(adapter.weights) for adapter in adapters)
        pieces.append([(end - len(one.weights), one.weights) for end, one in zip(ends, adapters, strict=True)])
    return joined((room.max_rank, room.width), versions, pieces)


def adapter_scales(room: AdapterRoom, rows: Sequence[Sequence[RowAdapter | PromptAdapter]]) -> FloatArray:
    """The factor of each rank of `adapter_weights`, (B, R)."""
    scales = np.zeros((len(rows), room.max_rank), np.float32)
    for row, adapters in enumerate(rows):
        first = 0
        for adapter in adapters:
            scales[row, first : first + len(adapter.weights)] = adapter.scale
            first += len(adapter.weights)
    return scales


def prompt_inputs(room: AdapterRoom, rows: Sequence[Sequence[PromptAdapter]]) -> dict[str, Array | StableRows]:
    """The inputs of a text encoder with room for adapters beside its token ids."""
    versions = np.array([next(VERSIONS) if adapters else 0 for adapters in rows], np.int64)
    return {"adapter_weights": adapter_weights(room, versions, rows), "adapter_scales": adapter_scales(room, rows)}


def joined(
    shape: tuple[int, ...], versions: npt.NDArray[np.int64], pieces: Sequence[Sequence[tuple[int, FloatArray]]]
) -> StableRows:
    """Rows of a shape that are zeros but for their pieces, each with the index on the first axis where it begins.

    They are put together where a runtime takes them: zeros that nobody wrote or reads take no memory.
    """

    def take(at: npt.NDArray[np.intp]) -> FloatArray:
        made = np.zeros((len(at), *shape), np.float32)
        for row, position in enumerate(at.tolist()):
            for first, piece in pieces[position]:
                made[row, first : first + len(piece)] = piece
        return made

    return StableRows(shape, versions, take)
