"""The wire's words in place of ours, and back. Nothing is decided here.

`drafts.py` reads requests, `messages.py` writes events and generations,
`models.py` pipelines, `statuses.py` errors; `specs.py`, `times.py` and
`words.py` are what they share.
"""

from safelight_server.convert.cache import purged_message, stats_message
from safelight_server.convert.messages import event_message, generation_message
from safelight_server.convert.models import model_message
from safelight_server.convert.specs import encoding_message, spec_message
from safelight_server.convert.statuses import status_of, trailing_metadata

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
