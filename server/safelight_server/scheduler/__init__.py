"""Step-level batch scheduler: decides which rows of which outputs run in the next batch. Pure: no clock, no I/O.

In the order of the data path:

    types.py       the vocabulary: outputs, rows, batches, events, limits
    core.py        `Scheduler`, the operations
    waiting.py     which waiting output starts next
    deadlines.py   which outputs have expired
    output_table.py   the state machine of each output and of each prompt
    ready.py       queues of what is ready for a batch; splits batches that failed
    batch_builder.py  which queue is served and how many rows a batch takes
    estimates.py   how long the work will take
    invariants.py  what must hold after every operation
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
