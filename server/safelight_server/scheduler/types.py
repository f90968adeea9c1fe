"""Types of the scheduler: outputs, rows, batches, events and limits. Ids and numbers only, no tensors."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Kind(enum.Enum):
    """The component that a batch runs."""

    ENCODE = "encode"
    DENOISE = "denoise"
    PREVIEW = "preview"
    DECODE = "decode"


class Priority(enum.IntEnum):
    """Priority classes. `WEIGHTS` are their relative shares of the slots and of instance time."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


WEIGHTS = {Priority.INTERACTIVE: 8, Priority.STANDARD: 4, Priority.BATCH: 1}


class OutputState(enum.Enum):
    """State of an output; `TRANSITIONS` lists the allowed changes."""

    WAITING = "waiting"  # for its first slot, or for another one after it was parked
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    ENDED = "ended"


TRANSITIONS: Mapping[OutputState, frozenset[OutputState]] = {
    OutputState.WAITING: frozenset(
        {OutputState.ENCODING, OutputState.DENOISING, OutputState.DECODING, OutputState.ENDED}
    ),
    OutputState.ENCODING: frozenset({OutputState.DENOISING, OutputState.ENDED}),
    OutputState.DENOISING: frozenset({OutputState.WAITING, OutputState.DECODING, OutputState.ENDED}),
    OutputState.DECODING: frozenset({OutputState.ENDED}),
    OutputState.ENDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class ScheduledOutput:
    """One picture of a generation: the unit that is scheduled.

    Attributes:
        caller: its caller, as TENANT/NAME; callers of one class take turns.
        rows_per_step: 1, or 2 with classifier-free guidance.
        guided_steps: the steps, from 0, with `rows_per_step` rows; others have only the conditional row. None: all.
        keys: batch key by kind: rows of equal keys (component version and shapes) can share a batch.
        conditioning: ids of the embeddings that it needs; outputs with the same id share one encoding.
        encoder_keys: batch keys of those embeddings whose key is not `keys[Kind.ENCODE]`, by conditioning id.
        deadline: seconds on the caller's clock, after which the output expires. `Scheduler.set_deadline` changes it.
        first_step: steps made before; above 0 if it is resumed, `num_steps` if only its decoding is left.
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
    encoder_keys: Mapping[str, str] = field(default_factory=dict)
    guided_steps: range | None = None

    def num_rows(self, step: int) -> int:
        """Rows of the step that is made after `step` steps."""
        return self.rows_per_step if self.guided_steps is None or step in self.guided_steps else 1

    def steps_by_rows(self, step: int) -> Sequence[tuple[int, int]]:
        """The steps left after `step` steps, as pairs: rows of a step, and the number of steps with so many rows."""
        left = num_full = self.num_steps - step
        if self.guided_steps is not None:
            guided = self.guided_steps
            num_full = len(range(max(step, guided.start), min(self.num_steps, guided.stop)))
        return [(rows, count) for rows, count in ((self.rows_per_step, num_full), (1, left - num_full)) if count]

    def encoder_key(self, conditioning_id: str) -> str:
        """The batch key under which one of its embeddings is computed."""
        return self.encoder_keys.get(conditioning_id, self.keys[Kind.ENCODE])

    @property
    def tenant(self) -> str:
        """The tenant of its caller."""
        return self.caller.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Row:
    """One input of a batch.

    Attributes:
        step: steps made before this one.
        part: 0 for the conditional row of a step, 1 for the unconditional one.
        conditioning_id: the prompt of an ENCODE row, which belongs to no single output (its output_id is -1).
    """

    output_id: int
    step: int = 0
    part: int = 0
    conditioning_id: str = ""


Member = int | str
"""The unit of ready queues, and of the success of a batch: an output id, or for ENCODE a conditioning id."""


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
        """The outputs, or for ENCODE the prompts, of the batch, each once, in the order of its rows."""
        if self.kind is Kind.ENCODE:
            return tuple(row.conditioning_id for row in self.rows)
        return tuple(dict.fromkeys(row.output_id for row in self.rows))


@dataclass(frozen=True, slots=True)
class StepCompleted:
    """All rows of a step are complete: `step` steps are made, and `last` says whether these are all."""

    output_id: int
    step: int
    last: bool


@dataclass(frozen=True, slots=True)
class OutputDecoded:
    """The output has been decoded and has ended."""

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
    """Answers `Scheduler.want_embedding`: the embedding has been computed, or `failed`."""

    conditioning_id: str
    failed: bool = False


Event = StepCompleted | OutputDecoded | OutputFailed | OutputExpired | EmbeddingReleased | EmbeddingReady


class CostModel(Protocol):
    """Measured seconds of a call by component and batch size."""

    def seconds(self, kind: Kind, key: str, rows: int) -> float:
        """Seconds of one call of `rows` rows on one instance."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of the scheduler.

    Attributes:
        max_running: slots: outputs that take part in batches at once.
        max_parked: outputs that wait in the middle of their steps, because others took their slots.
        max_rows: largest batch in rows, by kind and key.
        num_instances: live instances at the start; `Scheduler.set_instances` changes it.
        preview_share: share of instance time, 0 to 1, that previews may take from other work.
    """

    max_running: int
    max_rows: Callable[[Kind, str], int]
    num_instances: int
    preview_share: float = 0.1
    max_parked: int = 256


class InvariantError(AssertionError):
    """The scheduler contradicts itself: a bug."""
