"""The scheduler's vocabulary: ids and numbers only."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


class Kind(enum.Enum):
    """What a batch runs."""

    ENCODE = "encode"
    DENOISE = "denoise"
    PREVIEW = "preview"
    DECODE = "decode"


class Priority(enum.IntEnum):
    """Classes; `WEIGHTS` says how much more often a higher one starts."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


WEIGHTS = {Priority.INTERACTIVE: 8, Priority.STANDARD: 4, Priority.BATCH: 1}


class OutputState(enum.Enum):
    """Where an output is in its life."""

    WAITING = "waiting"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    ENDED = "ended"


TRANSITIONS: Mapping[OutputState, frozenset[OutputState]] = {
    OutputState.WAITING: frozenset(
        {OutputState.ENCODING, OutputState.DENOISING, OutputState.DECODING, OutputState.ENDED}
    ),
    OutputState.ENCODING: frozenset({OutputState.DENOISING, OutputState.ENDED}),
    OutputState.DENOISING: frozenset({OutputState.DECODING, OutputState.ENDED}),
    OutputState.DECODING: frozenset({OutputState.ENDED}),
    OutputState.ENDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class ScheduledOutput:
    """One picture of a generation: the unit that is scheduled.

    Attributes:
        rows_per_step: 1, or 2 with guidance.
        keys: by kind, who can share a batch: component version and shapes.
        conditioning: ids of the prompt embeddings it needs; an id wanted by many is encoded once.
        deadline: on the caller's clock; past it the output expires. `Scheduler.set_deadline` changes it.
        first_step: more than 0 where it goes on after a pause; `num_steps` where only its decoding is left.
    """

    output_id: int
    caller: str
    priority: Priority
    num_steps: int
    rows_per_step: int
    keys: Mapping[Kind, str]
    conditioning: tuple[str, ...]
    deadline: float | None = None
    first_step: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One input of a batch.

    Attributes:
        step: steps made before this one.
        part: 0 for the conditional row of a step, 1 for the unconditional one.
        conditioning_id: of an ENCODE row, which belongs to no single output (output_id -1).
    """

    output_id: int
    step: int = 0
    part: int = 0
    conditioning_id: str = ""


Member = int | str
"""What is in line for a batch and shares its fate: an output's id, or of an ENCODE batch a conditioning id."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that one instance runs in one call."""

    batch_id: int
    kind: Kind
    key: str
    instance: int
    rows: tuple[Row, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """What the batch is for, each once, in the order of its rows."""
        if self.kind is Kind.ENCODE:
            return tuple(row.conditioning_id for row in self.rows)
        return tuple(dict.fromkeys(row.output_id for row in self.rows))


@dataclass(frozen=True, slots=True)
class StepCompleted:
    """All rows of a step are back. `step` steps are made now; `last`: no more follow."""

    output_id: int
    step: int
    last: bool


@dataclass(frozen=True, slots=True)
class OutputDecoded:
    """The picture is there; the output has ended."""

    output_id: int


@dataclass(frozen=True, slots=True)
class OutputFailed:
    """The output has ended without a picture."""

    output_id: int


@dataclass(frozen=True, slots=True)
class OutputExpired:
    """The deadline has passed; the output has ended."""

    output_id: int


@dataclass(frozen=True, slots=True)
class EmbeddingReleased:
    """No output needs this embedding any more."""

    conditioning_id: str


@dataclass(frozen=True, slots=True)
class EmbeddingReady:
    """An embedding that was asked for by itself is there; `failed`: there is none."""

    conditioning_id: str
    failed: bool = False


Event = StepCompleted | OutputDecoded | OutputFailed | OutputExpired | EmbeddingReleased | EmbeddingReady


class CostModel(Protocol):
    """The measured step-time curve."""

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        """Seconds of one call on one instance."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the scheduler.

    Attributes:
        max_running: outputs that have started and not ended; each holds latents.
        max_rows: largest batch, by kind and key.
        num_instances: to begin with; `Scheduler.set_instances` changes it.
        preview_share: of instance time that previews may take from other work.
    """

    max_running: int
    max_rows: Callable[[Kind, str], int]
    num_instances: int
    preview_share: float = 0.1


class InvariantError(AssertionError):
    """The scheduler contradicts itself: a bug."""
