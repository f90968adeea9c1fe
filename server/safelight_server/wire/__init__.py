"""Domain values to protobuf messages. Nothing is decided here.

`to_proto.py` converts events and generations, `models.py` pipelines,
`cache.py` figures of the caches, `images.py` uploaded pictures, `quotas.py` quotas,
`statuses.py` errors. `specs.py`, `times.py` and `enums.py` are shared by them; the last two also convert what
clients send, for `validation/`.
"""

from safelight_server.wire.cache import purged_message, stats_message
from safelight_server.wire.images import image_message
from safelight_server.wire.models import model_message, unavailable_model
from safelight_server.wire.quotas import quotas_message
from safelight_server.wire.specs import encoding_message, spec_message
from safelight_server.wire.statuses import status_of, trailing_metadata
from safelight_server.wire.to_proto import event_message, generation_message

__all__ = [
    "encoding_message",
    "event_message",
    "generation_message",
    "image_message",
    "model_message",
    "purged_message",
    "quotas_message",
    "spec_message",
    "stats_message",
    "status_of",
    "trailing_metadata",
    "unavailable_model",
]
