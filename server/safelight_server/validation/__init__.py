"""Protobuf requests to domain requests: checks every field, names every fault, fills in every default.

This is the only way to a `domain.request.Request`. A request that passes goes
to the engine and is not checked again. Any other ends as InvalidRequestError
with one violation for each faulty field, or as NotFoundError.

`request.py` checks a whole GenerateRequest: `spec.py` what to generate,
`delivery.py` how the pixels are sent. `purge.py` checks PurgeCacheRequest,
`images.py` the first message of an upload.
`violations.py` collects the faults. All of it is pure, and its cost is bounded
by the limits here, however many entries a client sends.
"""

from safelight_server.validation.images import check_upload, resolve_image
from safelight_server.validation.purge import resolve_purge
from safelight_server.validation.request import (
    RequestLimits,
    body_digest,
    find_model,
    resolve_name,
    resolve_preview,
    resolve_priority,
    resolve_request,
)
from safelight_server.validation.spec import default_strength

__all__ = [
    "RequestLimits",
    "body_digest",
    "check_upload",
    "default_strength",
    "find_model",
    "resolve_image",
    "resolve_name",
    "resolve_preview",
    "resolve_priority",
    "resolve_purge",
    "resolve_request",
]
