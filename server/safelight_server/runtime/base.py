"""What executes a component of a pipeline: the protocol that `onnx`, `triton` and `simulated` share.

A runtime has instances (sessions on cores, GPUs, servers). One instance runs
one call at a time; the engine never starts a second one on it. Instances may
come and go: `usable` says which take calls, `watch` when that changes. Calls
are batched: the first axis of every array is the row.
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
    """An input whose rows stay the same from call to call: who holds a row already need not copy it again.

    Attributes:
        source: (N, ...) float32; the rows at `index` do not change while the call runs.
        index: (B,) the rows of `source` that the call takes.
        versions: (B,) int64; equal numbers stand for equal bits, in all calls of a process.
    """

    source: FloatArray
    index: npt.NDArray[np.intp]
    versions: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def array(self) -> FloatArray:
        """The rows, (B, ...), copied."""
        return self.source[self.index]


Inputs = Mapping[str, Array | StableRows]


class RuntimeStartError(Exception):
    """A runtime cannot start; the message says why."""


class FaultOrigin(enum.Enum):
    """What is blamed for a failed call, which decides what is tried again and where."""

    ROWS = "rows"
    INSTANCE = "instance"
    """The instance was lost. The rows are blamed only if they lose one instance after another."""
    NOBODY = "nobody"
    """The instance had no room and did not look at the rows."""


class RuntimeFailure(Exception):
    """A call failed.

    Attributes:
        retryable: the same rows may succeed on another try or instance.
    """

    def __init__(self, message: str, *, retryable: bool, fault: FaultOrigin = FaultOrigin.ROWS) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.fault = fault


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Median seconds of one call on one instance, measured at start-up, by rows.

    Attributes:
        rows: the batch sizes measured, ascending, beginning with 1.
        seconds: the median for each.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Seconds for `rows` rows, interpolated; beyond the last point by the last slope."""
        if len(self.rows) == 1 or rows <= self.rows[-1]:
            return float(np.interp(rows, self.rows, self.seconds)) * max(1.0, rows / self.rows[-1])
        (r0, r1), (s0, s1) = self.rows[-2:], self.seconds[-2:]
        return s1 + (rows - r1) * max(0.0, s1 - s0) / (r1 - r0)


class Runtime(Protocol):
    """Executes components.

    Attributes:
        name: "onnx", "triton" or "simulated"; shown to clients.
        num_instances: calls that may run at once, instances 0 … num_instances - 1, when all are live.
    """

    name: str
    num_instances: int

    @property
    def num_live(self) -> int:
        """Instances that are there now, busy or not."""

    def usable(self, free: Collection[int]) -> Sequence[int]:
        """Those of the free instances that can take a call now, the one to be given work first in front."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Has `changed` called on the event loop whenever an instance comes, goes or can take calls again."""

    async def start(self) -> None:
        """Loads every component, verifies that batches are bit-equal to single rows, measures the cost curves.

        Raises:
            RuntimeStartError: a component cannot be loaded, or the same row gives other bits when it is run again.
        """

    async def run(self, instance: int, model: str, component: Component, inputs: Inputs) -> Mapping[str, FloatArray]:
        """One batched call of a component of pipeline `model` on `instance`.

        Raises:
            RuntimeFailure: the call failed.
        """

    def max_rows(self, model: str, component: Component) -> int:
        """Largest batch that was verified."""

    def cost(self, model: str, component: Component) -> CostCurve:
        """The measured curve."""

    def numerics_id(self, model: str) -> str:
        """Names all that decides the bits of a result beside the spec."""

    async def close(self) -> None:
        """Releases what `start` took; running calls end first."""
