"""Who is in the next batch: the pure scheduler of steps, previews, encodings and decodings.

In the order of the data path: `types.py` the vocabulary; `core.py` the
operations; `waiting.py` who starts; `deadlines.py` who expires; `lives.py` what
becomes of each output; `ready.py` what stands in line for a batch, and what has
failed is set apart; `batching.py` who is in it; `estimates.py` how long that
will take; `invariants.py` what must always be true.
"""

from safelight_server.scheduler.core import Scheduler
from safelight_server.scheduler.estimates import NO_INSTANCE_S
from safelight_server.scheduler.types import (
    WEIGHTS,
    Batch,
    CostModel,
    EmbeddingReady,
    EmbeddingReleased,
    Event,
    InvariantError,
    Kind,
    Limits,
    Member,
    OutputDecoded,
    OutputExpired,
    OutputFailed,
    OutputState,
    Priority,
    Row,
    ScheduledOutput,
    StepCompleted,
)

__all__ = [
    "NO_INSTANCE_S",
    "WEIGHTS",
    "Batch",
    "CostModel",
    "EmbeddingReady",
    "EmbeddingReleased",
    "Event",
    "InvariantError",
    "Kind",
    "Limits",
    "Member",
    "OutputDecoded",
    "OutputExpired",
    "OutputFailed",
    "OutputState",
    "Priority",
    "Row",
    "ScheduledOutput",
    "Scheduler",
    "StepCompleted",
]
