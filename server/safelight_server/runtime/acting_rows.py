"""Which rows of a call bring adapters, for a runtime that computes nothing of adapters for the others. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safelight_server.catalog.manifest import ADAPTER_INPUTS, ADAPTER_SCALES_SOURCE, ADAPTER_WEIGHTS_SOURCE
from safelight_server.domain.tensors import Array
from safelight_server.runtime.base import Inputs, StableRows

ADAPTER_ROWS = "adapter_rows"
"""(A,) int64: the places in the batch of the rows that bring adapters."""


def of_acting_rows(inputs: Inputs) -> Inputs:
    """The inputs of a call, with the adapters of those rows alone that bring one, and with `ADAPTER_ROWS`.

    A row brings one where a factor is not 0, as an adapter with the factor 0 is none. Where no row brings one there are
    no inputs for adapters.
    """
    scales, weights = inputs.get(ADAPTER_SCALES_SOURCE), inputs.get(ADAPTER_WEIGHTS_SOURCE)
    if scales is None or weights is None:
        return inputs
    factors = scales.array() if isinstance(scales, StableRows) else scales
    found: dict[str, Array | StableRows] = {name: rows for name, rows in inputs.items() if name not in ADAPTER_INPUTS}
    places = np.flatnonzero((factors != 0).any(axis=1))
    if len(places):
        taken = _some(weights, places) if isinstance(weights, StableRows) else weights[places]
        found |= {ADAPTER_WEIGHTS_SOURCE: taken, ADAPTER_SCALES_SOURCE: factors[places], ADAPTER_ROWS: places}
    return found


def _some(rows: StableRows, places: npt.NDArray[np.intp]) -> StableRows:
    return StableRows(rows.shape, rows.versions[places], lambda at: rows.take(places[at]))
