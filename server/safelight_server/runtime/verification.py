"""Verifies at start that a component's batches agree with single rows, and measures its cost curve.

Invariant: a batch size is offered only if every row in it has the same bits as
when it is run alone, or for a runtime with a batch tolerance nearly the same
values. The example inputs depend on the shapes alone, so that the
outputs of two runtimes can be compared (`fingerprint`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from safelight_server.catalog.catalog import ManifestError
from safelight_server.catalog.manifest import (
    ADAPTER_INPUTS,
    CONTROL_IMAGES_SOURCE,
    CONTROL_SCALES_SOURCE,
    ENCODER_MASK_INPUT,
    GUIDANCE_INPUT,
    IMAGE_PROMPT_SCALE_SOURCE,
    MASK_SOURCE,
)
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.runtime.base import CostCurve

log = structlog.get_logger(__name__)

CANARY_EDGE = 8
"""Length of an open axis in a fingerprint."""
WARM_UP_ROWS = (1, 2, 4, 8, 16, 32, 64)
ALWAYS_ROWS = 16
"""Batches up to this are verified however long it takes, so that a busy start does not change what is offered."""
WARM_UP_BUDGET_S = 1.0
"""Time for one component; larger batches that cannot be verified in it are not offered."""
REPETITIONS = 3
LARGEST_GUIDANCE = 20.0
"""Networks that are given the guidance scale multiply it by 1000, which float16 holds up to 65."""
SMALL_VOCABULARY = 256
LAST_TIMESTEP = 999
CANARY_ROWS = (3, 2, 1)
"""Batch sizes in a fingerprint. All differ, so that answers which arrive one or two calls late are noticed."""

Call = Callable[[Mapping[str, Array]], Awaitable[Mapping[str, FloatArray]]]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Name, shape and type of an input of a component.

    Attributes:
        shape: shape of one row; -1 is an axis that differs with the size of the picture.
        is_ids: whether it holds int64 token ids; float32 otherwise.
    """

    name: str
    shape: tuple[int, ...]
    is_ids: bool = False


def at_sizes(inputs: Sequence[InputSpec], pipeline: Pipeline) -> list[list[InputSpec]]:
    """The inputs with their shapes at each size of the pipeline, the default first; one list where no axis is open.

    Raises:
        ManifestError: an open axis is neither a latent's nor a picture's.
    """
    if all(-1 not in spec.shape for spec in inputs):
        return [list(inputs)]
    found = []
    for size in pipeline.manifest.sizes:
        latent = pipeline.latent_shape(size.width_px, size.height_px)
        picture = (3, size.height_px, size.width_px)
        shapes = {"image": picture, CONTROL_IMAGES_SOURCE: (len(pipeline.manifest.controls), *picture)}
        shapes[MASK_SOURCE] = (1, *latent[1:])
        found.append([_at_size(spec, shapes.get(spec.name, latent)) for spec in inputs])
    return found


def _at_size(spec: InputSpec, shape: tuple[int, ...]) -> InputSpec:
    fits = len(spec.shape) == len(shape) and all(a in (-1, b) for a, b in zip(spec.shape, shape, strict=True))
    if -1 in spec.shape and not fits:
        raise ManifestError(f"input {spec.name} has an open dimension: {list(spec.shape)}")
    return InputSpec(spec.name, shape, spec.is_ids) if -1 in spec.shape else spec


def sizes(bound: int) -> list[int]:
    """Batch sizes to verify: powers of two below the model's own bound, and the bound, at most 64."""
    return sorted({rows for rows in WARM_UP_ROWS if rows < bound} | {min(bound, WARM_UP_ROWS[-1])})


def example(inputs: Sequence[InputSpec], rows: int) -> dict[str, Array]:
    """Example inputs of `rows` rows, all different; always the same for the same shapes."""
    rng = np.random.default_rng(rows)
    made: dict[str, Array] = {}
    pictures_open = any(spec.name == CONTROL_IMAGES_SOURCE and -1 in spec.shape for spec in inputs)
    for spec in sorted(inputs, key=lambda spec: spec.name):
        shape = (rows, *(CANARY_EDGE if axis < 0 else axis for axis in spec.shape))
        if spec.is_ids:
            made[spec.name] = rng.integers(0, SMALL_VOCABULARY, shape)
        elif not spec.shape:
            made[spec.name] = rng.uniform(0, LAST_TIMESTEP, shape).astype(np.float32)
        else:
            made[spec.name] = rng.standard_normal(shape, dtype=np.float32)
        if spec.name in ADAPTER_INPUTS:  # of the size of trained ones, and of every third row none
            made[spec.name] *= np.float32(0.1)
            made[spec.name][2::3] = 0
        if spec.name == CONTROL_SCALES_SOURCE:  # some rows with all networks, some with a part of them, some without
            acting = np.arange(rows)[:, None] % 3 != 2
            made[spec.name] *= acting & ((np.arange(rows)[:, None] + np.arange(shape[1])) % 4 != 3)
            made[spec.name] *= not pictures_open  # no network runs on pictures whose size is not that of the latents
        if spec.name == IMAGE_PROMPT_SCALE_SOURCE:  # at most 1, and of every third row none
            made[spec.name] *= np.float32(1 / LAST_TIMESTEP)
            made[spec.name][2::3] = 0
        if spec.name == GUIDANCE_INPUT:
            made[spec.name] *= np.float32(LARGEST_GUIDANCE / LAST_TIMESTEP)
        if spec.name == ENCODER_MASK_INPUT:  # prompts of all lengths, the first as long as the context
            lengths = rng.integers(1, shape[-1] + 1, rows)
            lengths[0] = shape[-1]
            made[spec.name] = (np.arange(shape[-1]) < lengths[:, None]).astype(np.float32)
    return made


async def warm_up_sizes(
    call: Call, inputs: Sequence[Sequence[InputSpec]], bound: int, tolerance: float = 0.0
) -> CostCurve | None:
    """Like `warm_up` for several sizes of pictures: batch sizes are offered only if they were verified at each size.

    Returns:
        The cost curve at the first size; None if a size does not give the same bits when it is run again.
    """
    curves = []
    for specs in inputs:
        curve = await warm_up(call, specs, bound, tolerance)
        if curve is None:
            return None
        curves.append(curve)
        bound = min(bound, curve.rows[-1])
    rows = [at for at in curves[0].rows if at <= bound]
    return CostCurve(tuple(rows), curves[0].seconds[: len(rows)])


async def warm_up(call: Call, inputs: Sequence[InputSpec], bound: int, tolerance: float = 0.0) -> CostCurve | None:
    """Measures batches of growing size until one does not agree with single rows or the time is up.

    Args:
        tolerance: largest deviation of a batch from single rows, relative to the largest value of the result; 0: the
            bits must be equal. A single row must always give the same bits again.

    Returns:
        The cost curve; None if not even a single row gives the same bits when it is run again.
    """
    rows_done: list[int] = []
    seconds: list[float] = []
    began = time.perf_counter()
    for rows in sizes(bound):
        feed = example(inputs, rows)
        if (
            rows > ALWAYS_ROWS
            and time.perf_counter() - began + 2 * rows * seconds[-1] / rows_done[-1] > WARM_UP_BUDGET_S
        ):
            break
        if not await _agree(call, feed, rows, tolerance if rows > 1 else 0.0):
            log.warning("batch_not_equal_to_single_rows", rows=rows, tolerance=tolerance)
            break
        rows_done.append(rows)
        seconds.append(await _median_s(call, _uncontrolled(feed), REPETITIONS if rows < 8 else 1))
    return CostCurve(tuple(rows_done), tuple(seconds)) if rows_done else None


async def fingerprint(call: Call, inputs: Sequence[InputSpec]) -> str:
    """SHA-256 of a component's outputs for example batches: equal for runtimes that compute the same bits."""
    digest = hashlib.sha256()
    for rows in CANARY_ROWS:
        results = await call(example(inputs, rows))
        for name in sorted(results):
            digest.update(name.encode() + np.ascontiguousarray(results[name]).tobytes())
    return digest.hexdigest()


def _uncontrolled(feed: Mapping[str, Array]) -> Mapping[str, Array]:
    """The same batch without control networks: the costs that are told are those of plain rows."""
    return {name: np.zeros_like(array) if name == CONTROL_SCALES_SOURCE else array for name, array in feed.items()}


async def _agree(call: Call, feed: Mapping[str, Array], rows: int, tolerance: float) -> bool:
    batch = await call(feed)
    for row in range(rows):
        single = await call({name: array[row : row + 1] for name, array in feed.items()})
        if any(not _near(batch[name][row : row + 1], single[name], tolerance) for name in batch):
            return False
    return True


def _near(found: FloatArray, wanted: FloatArray, tolerance: float) -> bool:
    if not tolerance or found.shape != wanted.shape:
        return np.array_equal(found, wanted)
    return bool(np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max())  # also false where one is no number


async def _median_s(call: Call, feed: Mapping[str, Array], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        await call(feed)
        times.append(time.perf_counter() - began)
    return float(np.median(times))
