"""Drafts to requests: everything is checked, every fault is named, every default filled in.

The one way into `request.Request`. What passes here reaches the engine; what
does not is an InvalidRequestError with a violation per field, or a
NotFoundError. `violations.py` collects, `spec.py` decides what is developed,
`delivery.py` how it travels, `request.py` puts both together;
`purge.py` is of the caches' administration.
"""

from safelight_server.validation.purge import resolve_purge
from safelight_server.validation.request import (
    RequestLimits,
    find_model,
    resolve_name,
    resolve_preview,
    resolve_priority,
    resolve_request,
)

__all__ = [
    "RequestLimits",
    "find_model",
    "resolve_name",
    "resolve_preview",
    "resolve_priority",
    "resolve_purge",
    "resolve_request",
]
