"""What happens to a generation and how it stands, in the domain's own words.

`generation.py` says it, `stream/` sends it, `convert/` puts it into messages.
Plain values: once made they never change.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from safelight_server.domain.errors import SafelightError
from safelight_server.domain.request import Notice, PixelEncoding, Spec
from safelight_server.scheduler import Priority


class GenerationState(enum.Enum):
    """Where a generation is in its life."""

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
    """What is promised of a generation that was accepted.

    LOCAL:      it is lost with the server that accepted it.
    REPLICATED: another replica goes on with it.
    """

    LOCAL = "local"
    REPLICATED = "replicated"


class Disposition(enum.Enum):
    """Where a picture came from.

    MISS:      it was developed for this output.
    COALESCED: it was developed for an identical output that was on its way already.
    EXACT:     it was developed for an identical output before.
    SIMILAR:   it was developed for another prompt that says the same, or another seed.
    LATENT:    it was developed from the latent of an output with a prompt nearby.
    BRANCHED:  it was developed from the step that the request named.
    """

    MISS = "miss"
    COALESCED = "coalesced"
    EXACT = "exact"
    SIMILAR = "similar"
    LATENT = "latent"
    BRANCHED = "branched"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a picture came from, in full.

    Attributes:
        similarity: cosine, for SIMILAR and LATENT.
        source: resource name of the generation that developed it, for EXACT and SIMILAR.
        num_steps_skipped: steps that were not made for this output.
        compute_s_saved: what they have cost where they were made, or would have cost at the pace of the others.
        numerics_id: of the replica that went on with it, where they are others than it was accepted with.
    """

    disposition: Disposition = Disposition.MISS
    similarity: float = 0.0
    source: str = ""
    num_steps_skipped: int = 0
    compute_s_saved: float = 0.0
    numerics_id: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a generation has used: its share of the batches' time, denoiser rows, steps, previews sent."""

    compute_s: float = 0.0
    num_rows: int = 0
    num_steps: int = 0
    num_previews: int = 0
    preview_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds; None where a stage did not happen. Stages overlap."""

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
    """It waits: outputs ahead of it in its class, and when it should start."""

    position: int
    starts_at: datetime


@dataclass(frozen=True, slots=True)
class Progress:
    """An output has made a step, in a call shared by `batch_size` outputs."""

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
        error: None: well.
        origins: of each output that is complete, None for the others.
    """

    error: SafelightError | None
    usage: Usage
    timings: Timings
    origins: tuple[Origin | None, ...] = ()


StateEvent = Accepted | OutputFinished | Finished
"""Numbered, reliable."""
Event = StateEvent | Queued | Progress


@dataclass(frozen=True, slots=True)
class OutputView:
    """An output as it is now."""

    index: int
    step: int
    num_steps: int
    reason: FinishReason | None
    total_bytes: int


@dataclass(frozen=True, slots=True)
class GenerationView:
    """A generation as it is now. `finish_time` and, where it failed, `error` say how it ended."""

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
