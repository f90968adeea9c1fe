"""The wire's words in place of ours, and back. Nothing is decided here.

`messages.py` reads requests, `to_proto.py` writes events and generations,
`models.py` pipelines, `statuses.py` errors; `specs.py`, `times.py` and
`enums.py` are what they share.
"""

from safelight_server.wire.cache import purged_message, stats_message
from safelight_server.wire.models import model_message
from safelight_server.wire.specs import encoding_message, spec_message
from safelight_server.wire.statuses import status_of, trailing_metadata
from safelight_server.wire.to_proto import event_message, generation_message

__all__ = [
    "encoding_message",
    "event_message",
    "generation_message",
    "model_message",
    "purged_message",
    "spec_message",
    "stats_message",
    "status_of",
    "trailing_metadata",
]
