"""The `Runtime` protocol: executes the components of a pipeline (text encoder, denoiser, decoders) in batches.

`onnx`, `torch`, `triton` and `simulated` implement it. A runtime has instances: ONNX
sessions in this process, or calls that a Triton server takes at once. An
instance runs one call at a time; the engine never starts a second one on it.
Instances may come and go: `usable` says which take calls now, and `watch`
reports changes. The first axis of every input and output array is the row of
the batch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Array, FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class StableRows:
    """An input whose rows stay the same from call to call, so that a runtime which holds a row need not copy it again.

    Attributes:
        shape: of one row.
        versions: (B,) int64; rows with equal versions are bit-equal, in all calls of a process. 0: a row of zeros.
        take: makes a copy, (N, ...) float32, of the rows at N positions in the batch. Its rows do not change while the
            call runs.
    """

    shape: tuple[int, ...]
    versions: npt.NDArray[np.int64]
    take: Callable[[npt.NDArray[np.intp]], FloatArray]

    def __len__(self) -> int:
        return len(self.versions)

    def array(self) -> FloatArray:
        """A copy of the rows, (B, ...) float32."""
        return self.take(np.arange(len(self)))


Inputs = Mapping[str, Array | StableRows]


class RuntimeStartError(Exception):
    """A runtime cannot start; the message says why."""


class FaultOrigin(enum.Enum):
    """What caused a failed call; decides what is tried again, and on which instance."""

    ROWS = "rows"
    INSTANCE = "instance"
    """The instance was lost. The rows are suspected only if they lose one instance after another."""
    NOBODY = "nobody"
    """The instance was full and refused the call before it ran any row."""


class RuntimeFailure(Exception):
    """A call failed.

    Attributes:
        retryable: whether the same rows may succeed on another try or instance.
        fault: what caused the failure.
    """

    def __init__(self, message: str, *, retryable: bool, fault: FaultOrigin = FaultOrigin.ROWS) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.fault = fault


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Median seconds of one call on one instance by batch size, measured at start-up.

    Attributes:
        rows: the batch sizes measured, ascending, beginning with 1.
        seconds: the median for each.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Seconds of a call of `rows` rows: interpolated, and extrapolated with the last slope."""
        if len(self.rows) == 1 or rows <= self.rows[-1]:
            return float(np.interp(rows, self.rows, self.seconds)) * max(1.0, rows / self.rows[-1])
        (r0, r1), (s0, s1) = self.rows[-2:], self.seconds[-2:]
        return s1 + (rows - r1) * max(0.0, s1 - s0) / (r1 - r0)


class Runtime(Protocol):
    """Executes components of pipelines on a number of instances.

    Attributes:
        name: "onnx", "torch", "triton" or "simulated"; shown to clients.
        num_instances: calls that may run at once when all instances are live; they are numbered from 0.
    """

    name: str
    num_instances: int

    @property
    def num_live(self) -> int:
        """Number of instances that are live now, busy or not."""

    def usable(self, free: Collection[int]) -> Sequence[int]:
        """The members of `free` that can take a call now, in the order in which they should be given work."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Sets the callback for changes: called on the event loop when an instance comes, goes or has room again."""

    async def start(self) -> None:
        """Loads every component, verifies that batches agree with single rows and measures the cost curves.

        Raises:
            RuntimeStartError: a component cannot be loaded, or does not give the same bits for the same row twice.
        """

    async def run(self, instance: int, model: str, component: Component, inputs: Inputs) -> Mapping[str, FloatArray]:
        """Runs one batch through a component of pipeline `model` on `instance`; returns the outputs by name.

        Raises:
            RuntimeFailure: the call failed.
        """

    def max_rows(self, model: str, component: Component) -> int:
        """Largest batch, in rows, that was verified to agree with single rows, to `batch_tolerance`."""

    def cost(self, model: str, component: Component) -> CostCurve:
        """The cost curve that was measured at start-up."""

    def batch_tolerance(self, model: str) -> float:
        """How far a row may be from what it is alone, by the rows that share its call; 0: its bits are the same.

        Relative to the largest value of a component's result. Above 0 it is part of `numerics_id`.
        """

    def numerics_id(self, model: str) -> str:
        """Identifies what decides the bits of a result besides the request: library, build, precision, hardware."""

    async def close(self) -> None:
        """Waits for running calls, then releases what `start` loaded."""
