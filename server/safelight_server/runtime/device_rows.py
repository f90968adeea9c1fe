"""Keeps on a device the rows that the last call of a component brought, so that a row is copied there once.

A generation's embedding and its adapters are the same in each of its steps
(`StableRows`). Its rows with the prompt and with the negative prompt have the same
adapters, of which one copy is kept. Imported by the `torch` runtime alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from safelight_server.domain.tensors import FloatArray
from safelight_server.runtime.base import StableRows


class DeviceRows:
    """The rows that one instance has on its device. Not for several threads: an instance makes one call at a time.

    Invariant: of an input there are at most the rows of the last call that brought it, and of a call that failed none.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, dict[int, Tensor]] = {}

    def batch(self, key: Hashable, rows: StableRows, upload: Callable[[FloatArray], Tensor]) -> Tensor:
        """The rows as one tensor on the device, (B, ...).

        Args:
            key: names the input.
            upload: copies rows to the device; called for those alone that are not there yet.
        """
        versions = rows.versions.tolist()
        known = self._held.pop(key, {})
        held = {version: known[version] for version in versions if version in known}
        known.clear()  # before others are copied, so that their memory is free
        for place, version in enumerate(versions):
            if version not in held:
                held[version] = upload(rows.take(np.array([place])))[0]
        self._held[key] = held
        return torch.stack([held[version] for version in versions])

    def clear(self) -> None:
        """Drops all rows."""
        self._held.clear()
