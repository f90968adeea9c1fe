"""Who is in the next batch: the pure scheduler of steps, previews, encodings and decodings.

`types.py` has the vocabulary, `waiting.py` decides who starts, `core.py` who is
in a batch.
"""

from safelight_server.scheduler.core import Scheduler
from safelight_server.scheduler.types import (
    WEIGHTS,
    Batch,
    CostModel,
    Decoded,
    Event,
    Expired,
    Failed,
    InvariantError,
    Kind,
    Limits,
    Output,
    Priority,
    Released,
    Row,
    State,
    Stepped,
)

__all__ = [
    "WEIGHTS",
    "Batch",
    "CostModel",
    "Decoded",
    "Event",
    "Expired",
    "Failed",
    "InvariantError",
    "Kind",
    "Limits",
    "Output",
    "Priority",
    "Released",
    "Row",
    "Scheduler",
    "State",
    "Stepped",
]
