"""Checks requests to purge the caches."""

from __future__ import annotations

import re

from safelight.v1 import cache_pb2

from safelight_server.domain.request import PurgeRequest
from safelight_server.validation.violations import NAME, Violations


def resolve_purge(message: cache_pb2.PurgeCacheRequest) -> PurgeRequest:
    """Checks a PurgeCacheRequest.

    Raises:
        InvalidRequestError: with all faults.
    """
    faults = Violations()
    # An empty request would purge everything, which nobody should do by accident.
    given = bool(message.tenant or message.model_revision or message.generation)
    faults.check(given, "tenant", "one of tenant, model_revision and generation must be set")
    for field, value, form, words in (
        ("tenant", message.tenant, NAME, "the name of a tenant"),
        ("model_revision", message.model_revision, rf"{NAME}/{NAME}", "MODEL/REVISION, such as icons/3"),
        ("generation", message.generation, rf"generations/{NAME}", "generations/ID, as the server gave it"),
    ):
        faults.check(not value or bool(re.fullmatch(form, value)), field, f"must be {words}")
    faults.done()
    return PurgeRequest(message.tenant, message.model_revision, message.generation)
