"""Loads the weights of the adapters that a generation names."""

from __future__ import annotations

from safelight_server.catalog.adapter_files import AdapterFileError
from safelight_server.catalog.adapters import AdapterRoomError
from safelight_server.catalog.catalog import Catalog
from safelight_server.domain.errors import FieldViolation, NotFoundError, UnavailableError
from safelight_server.domain.request import Spec
from safelight_server.engine.adapters import PromptAdapter, RowAdapter

RETRY_S = 1.0


async def load_adapters(catalog: Catalog, spec: Spec, tenant: str) -> tuple[RowAdapter, ...]:
    """The adapters of a spec, with their weights, which are read in a thread.

    Raises:
        NotFoundError: one is not there any more, or its file is another now.
        UnavailableError: those in use leave no memory for it.
    """
    found = []
    room = catalog.get(spec.model).manifest.adapters
    width = 0 if room is None else room.width  # none: another replica has accepted it, and no adapter is found below
    for adapter in spec.adapters:
        try:
            weights = await catalog.adapters.fetch(tenant, spec.model, adapter.name, adapter.sha256)
        except AdapterFileError as error:
            what = f"the adapter {adapter.name} {error}; ListModels shows those that there are"
            violation = FieldViolation("spec.adapters", what)
            raise NotFoundError(what, reason="ADAPTER_NOT_FOUND", violations=[violation]) from None
        except AdapterRoomError as error:
            raise UnavailableError(str(error), reason="TOO_MANY_ADAPTERS", retry_after_s=RETRY_S) from None
        text = None
        if weights.shape[1] > width:
            text = PromptAdapter(weights[:, width:], adapter.scale, adapter.sha256)
        found.append(RowAdapter(weights[:, :width], adapter.scale, text))
    return tuple(found)
