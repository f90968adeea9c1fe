"""What happens to a generation (events), and the state of a generation at one moment (views).

Immutable values. `generations/` makes them, `wire/to_proto.py` turns them into
protobuf messages, `stream/` sends them to clients.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from safelight_server.domain.errors import SafelightError
from safelight_server.domain.request import Degradation, Notice, PixelEncoding, Spec
from safelight_server.scheduler import Priority


class GenerationState(enum.Enum):
    """The state of a generation, as in `Generation.State` of the proto."""

    QUEUED = "queued"
    RUNNING = "running"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    FAILED = "failed"


class FinishReason(enum.Enum):
    """Why an output ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    FAILED = "failed"


class Durability(enum.Enum):
    """What happens to an accepted generation when its server is lost.

    LOCAL:      the generation is lost with the server.
    REPLICATED: another replica continues it.
    """

    LOCAL = "local"
    REPLICATED = "replicated"


class Disposition(enum.Enum):
    """Where the picture of an output came from.

    MISS:      computed in full for this output.
    COALESCED: shared with an identical output that was being computed already.
    EXACT:     taken from the cache: an identical output was computed before.
    SIMILAR:   taken from the cache: computed for a prompt with the same meaning, or for another seed.
    LATENT:    computed from the cached latent of an output with a similar prompt.
    BRANCHED:  computed from the step of another generation that the request named.
    """

    MISS = "miss"
    COALESCED = "coalesced"
    EXACT = "exact"
    SIMILAR = "similar"
    LATENT = "latent"
    BRANCHED = "branched"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the picture of an output came from, and what that saved.

    Attributes:
        similarity: cosine similarity of the prompts, for SIMILAR and LATENT.
        source: resource name of the generation that computed the picture, for EXACT and SIMILAR.
        num_steps_skipped: denoising steps that were not run for this output.
        compute_s_saved: seconds that the skipped steps took when they ran, or an estimate from the other steps.
        numerics_id: numerics id of the replica that continued the generation, if it differs from that in Accepted.
    """

    disposition: Disposition = Disposition.MISS
    similarity: float = 0.0
    source: str = ""
    num_steps_skipped: int = 0
    compute_s_saved: float = 0.0
    numerics_id: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a generation has used: compute time (its share of each batch), denoiser rows, steps, previews sent.

    Attributes:
        cost_nanos: billionths of a unit of `currency` that the compute costs.
        currency: ISO 4217; empty: the server has no price.
        num_rows_skipped: denoiser rows that were not computed, as their steps lie outside the guidance interval.
    """

    compute_s: float = 0.0
    num_rows: int = 0
    num_steps: int = 0
    num_previews: int = 0
    preview_bytes: int = 0
    cost_nanos: int = 0
    currency: str = ""
    num_rows_skipped: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in each stage; None for a stage that did not happen. Stages overlap."""

    queue_s: float | None = None
    first_preview_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    total_s: float | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request was admitted."""

    spec: Spec
    numerics_id: str
    encoding: PixelEncoding
    estimate_s: float
    trace_id: str = ""
    warnings: tuple[Notice, ...] = ()
    durability: Durability = Durability.LOCAL


@dataclass(frozen=True, slots=True)
class Queued:
    """The generation waits: the number of outputs ahead of it in its priority class, and its estimated start."""

    position: int
    starts_at: datetime


@dataclass(frozen=True, slots=True)
class Progress:
    """An output has finished a denoising step, in a batch of `batch_size` outputs."""

    output_index: int
    step: int
    num_steps: int
    batch_size: int
    remaining_s: float


@dataclass(frozen=True, slots=True)
class OutputFinished:
    """An output has ended after `step` steps."""

    output_index: int
    reason: FinishReason
    step: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The generation has ended.

    Attributes:
        error: why it failed; None: it succeeded.
        origins: one for each output, in order; None for outputs that did not complete.
        degradations: what its quality floor gave up under load.
    """

    error: SafelightError | None
    usage: Usage
    timings: Timings
    origins: tuple[Origin | None, ...] = ()
    degradations: tuple[Degradation, ...] = ()


StateEvent = Accepted | OutputFinished | Finished
"""Events with a sequence number. A stream never drops one."""
Event = StateEvent | Queued | Progress


@dataclass(frozen=True, slots=True)
class OutputView:
    """The state of an output at one moment."""

    index: int
    step: int
    num_steps: int
    reason: FinishReason | None
    total_bytes: int


@dataclass(frozen=True, slots=True)
class GenerationView:
    """The state of a generation at one moment. `finish_time` is set once it has ended, `error` if it failed."""

    name: str
    state: GenerationState
    spec: Spec
    priority: Priority
    create_time: datetime
    usage: Usage
    last_sequence: int
    outputs: tuple[OutputView, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    finish_time: datetime | None = None
    error: SafelightError | None = None
    degradations: tuple[Degradation, ...] = ()
