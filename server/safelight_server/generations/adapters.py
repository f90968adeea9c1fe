"""Loads the weights of the adapters that a generation names."""

from __future__ import annotations

import asyncio

from safelight_server.catalog.adapters import AdapterFileError, AdapterLibrary, AdapterRoomError
from safelight_server.domain.errors import FieldViolation, NotFoundError, UnavailableError
from safelight_server.domain.request import Spec
from safelight_server.engine.latents import RowAdapter

RETRY_S = 1.0


async def load_adapters(library: AdapterLibrary, spec: Spec) -> tuple[RowAdapter, ...]:
    """The adapters of a spec, with their weights, which are read in a thread.

    Raises:
        NotFoundError: one is not there any more, or its file is another now.
        UnavailableError: those in use leave no memory for it.
    """
    found = []
    for adapter in spec.adapters:
        try:
            weights = await asyncio.to_thread(library.weights, spec.model, adapter.name, adapter.sha256)
        except AdapterFileError as error:
            what = f"the adapter {adapter.name} {error}; ListModels shows those that there are"
            violation = FieldViolation("spec.adapters", what)
            raise NotFoundError(what, reason="ADAPTER_NOT_FOUND", violations=[violation]) from None
        except AdapterRoomError as error:
            raise UnavailableError(str(error), reason="TOO_MANY_ADAPTERS", retry_after_s=RETRY_S) from None
        found.append(RowAdapter(weights, adapter.scale))
    return tuple(found)
