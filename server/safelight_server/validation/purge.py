"""What is to be purged from the caches."""

from __future__ import annotations

import re

from safelight_server.domain.request import PurgeRequest
from safelight_server.validation.draft import PurgeDraft
from safelight_server.validation.violations import NAME, Violations


def resolve_purge(draft: PurgeDraft) -> PurgeRequest:
    """A valid purge: nothing given would mean everything, which nobody wants by accident.

    Raises:
        InvalidRequestError: with all faults.
    """
    faults = Violations()
    given = bool(draft.tenant or draft.model_revision or draft.generation)
    faults.check(given, "tenant", "give a tenant, a model_revision or a generation")
    for field, value, form, words in (
        ("tenant", draft.tenant, NAME, "the name of a tenant"),
        ("model_revision", draft.model_revision, rf"{NAME}/{NAME}", "MODEL/REVISION, such as icons/3"),
        ("generation", draft.generation, rf"generations/{NAME}", "generations/ID, as the server gave it"),
    ):
        faults.check(not value or bool(re.fullmatch(form, value)), field, f"must be {words}")
    faults.done()
    return PurgeRequest(draft.tenant, draft.model_revision, draft.generation)
