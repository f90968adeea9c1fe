"""System shared memory between the gateway and one server: regions, made and registered once, used call after call.

A region has room for the inputs and outputs of a model's largest batch. A
server writes the results of a call into it whenever it gets to that, even if
the call was given up long ago: a stopped process does when it goes on. So:

Invariant: a region is used for a call only if the server has answered every
earlier call that was given it. One of an unanswered call is in quarantine
until the server answers, or is found to have forgotten it: then the server
that could write into it is no more, and the region is unlinked, never reused.

Where rows stay the same from call to call they also keep their places, and
are copied only where a place held something else (`place`).
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from safelight_server.domain.tensors import FloatArray
from safelight_server.runtime.base import Inputs, StableRows
from safelight_server.runtime.triton.client import CallFailed
from safelight_server.runtime.triton.models import ModelKey, Tensor

log = structlog.get_logger(__name__)

ALIGNMENT_BYTES = 64
FOLDER = Path("/dev/shm")  # where Linux keeps POSIX shared memory


class Registrar(Protocol):
    """What of a server is needed here; see `client.Client`."""

    async def register(self, name: str, key: str, num_bytes: int, timeout_s: float) -> None:
        """Makes a region known to the server."""

    async def unregister(self, name: str, timeout_s: float) -> None:
        """Makes the server forget a region."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a region, row after row."""

    offset: int
    row_bytes: int


def place(held: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """A place below len(wanted) for each row: the one that holds its version already, else one that is left."""
    count = len(wanted)
    at = {version: position for position, version in enumerate(held[:count].tolist()) if version}
    places = [at.pop(version, -1) for version in wanted.tolist()]
    left = iter(sorted(set(range(count)).difference(places)))
    return np.array([next(left) if position < 0 else position for position in places], np.intp)


class Region:
    """A piece of shared memory laid out for the batches of one model.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, name: str, model: ModelKey, tensors: Sequence[Tensor], max_rows: int) -> None:
        self.name = name
        self.key = f"/{name}"
        self.model = model
        self.places: dict[str, Place] = {}
        num_bytes = 0
        for tensor in tensors:
            self.places[tensor.name] = Place(num_bytes, tensor.row_bytes)
            num_bytes += -(-tensor.row_bytes * max_rows // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.num_bytes = num_bytes
        self._memory = SharedMemory(name, create=True, size=num_bytes)
        try:
            with (FOLDER / name).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full /dev/shm is an error here, later a SIGBUS
        except OSError:
            self.unlink()
            raise
        self._views: dict[str, npt.NDArray[Any]] = {
            at.name: np.ndarray((max_rows, *at.dims), at.dtype, self._memory.buf, self.places[at.name].offset)
            for at in tensors
        }
        self._held = {at.name: np.zeros(max_rows, np.int64) for at in tensors}

    def write(self, inputs: Inputs) -> npt.NDArray[np.intp]:
        """Copies the rows of a batch in, those of `StableRows` only where they are not there yet.

        Returns:
            The place of each row.
        """
        stable = {name: rows for name, rows in inputs.items() if isinstance(rows, StableRows)}
        if stable:
            first = next(iter(stable))
            places = place(self._held[first], stable[first].versions)
        else:
            places = np.arange(len(next(iter(inputs.values()))), dtype=np.intp)
        for name, rows in inputs.items():
            view = self._views[name]
            if isinstance(rows, StableRows):
                held = self._held[name]
                stale = np.flatnonzero(held[places] != rows.versions)
                view[places[stale]] = rows.source[rows.index[stale]]
                held[places[stale]] = rows.versions[stale]
            else:
                view[places] = rows.reshape(len(rows), *view.shape[1:])
        return places

    def read(self, name: str, places: npt.NDArray[np.intp]) -> FloatArray:
        """The rows of an output, copied."""
        rows: FloatArray = self._views[name][places]
        return rows

    def unlink(self) -> None:
        """Lets the memory go; a server that has it open keeps it for itself."""
        self._views = {}
        self._memory.close()
        self._memory.unlink()


class RegionPool:
    """The regions of one server.

    Args:
        max_quarantined: regions of unanswered calls; with so many, no more memory is given to the server.
        timeout_s: for registrations.
    """

    def __init__(self, registrar: Registrar, *, max_quarantined: int, timeout_s: float) -> None:
        self._registrar = registrar
        self._max_quarantined = max_quarantined
        self._timeout_s = timeout_s
        self._prefix = f"safelight-{os.getpid()}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        self._idle: defaultdict[ModelKey, list[Region]] = defaultdict(list)
        self._busy: set[Region] = set()
        self._quarantine: set[Region] = set()
        self._forgotten: set[Region] = set()

    @property
    def num_regions(self) -> int:
        """All that exist."""
        return sum(map(len, self._idle.values())) + len(self._busy) + len(self._quarantine)

    @property
    def num_quarantined(self) -> int:
        """Those of calls that were given up and not answered."""
        return len(self._quarantine)

    async def take(self, model: ModelKey, tensors: Sequence[Tensor], max_rows: int) -> Region | None:
        """A region for a call; registered. None: there is no room, or too many are in quarantine.

        Raises:
            CallFailed: the server does not take it.
        """
        if idle := self._idle[model]:
            region = idle.pop()
            self._busy.add(region)
            return region
        if len(self._quarantine) >= self._max_quarantined:
            return None
        try:
            region = Region(f"{self._prefix}-{next(self._numbers)}", model, tensors, max_rows)
        except OSError as error:
            log.warning("no_shared_memory", error=str(error))
            return None
        try:
            await self._registrar.register(region.name, region.key, region.num_bytes, self._timeout_s)
        except BaseException:
            region.unlink()
            raise
        self._busy.add(region)
        return region

    def give_back(self, region: Region) -> None:
        """The server has answered the call: the region can be used again."""
        self._busy.discard(region)
        self._quarantine.discard(region)
        if region in self._forgotten:
            self._forgotten.remove(region)
            region.unlink()
        else:
            self._idle[region.model].append(region)

    def quarantine(self, region: Region) -> None:
        """The call was given up, or its connection was lost: nobody knows what the server does to the region."""
        self._busy.remove(region)
        self._quarantine.add(region)

    def known(self, names: set[str]) -> None:
        """What the server says that it knows: the other regions were those of an earlier server, and go."""
        for model, regions in self._idle.items():
            gone = [region for region in regions if region.name not in names]
            self._idle[model] = [region for region in regions if region.name in names]
            for region in gone:
                region.unlink()
        for region in [region for region in self._quarantine if region.name not in names]:
            self._quarantine.remove(region)
            self._forgotten.discard(region)
            region.unlink()
        self._forgotten |= {region for region in self._busy if region.name not in names}

    async def close(self) -> None:
        """Lets all memory go. Regions that the server may still write into are not unregistered, only unlinked."""
        idle = [region for regions in self._idle.values() for region in regions]
        self._idle.clear()
        try:
            for region in idle:
                await self._registrar.unregister(region.name, self._timeout_s)
        except CallFailed as failure:
            log.info("not_unregistered", error=str(failure))
        finally:
            for region in [*idle, *self._busy, *self._quarantine]:
                region.unlink()
            self._busy.clear()
            self._quarantine.clear()


def layout(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> list[Tensor] | None:
    """The tensors of a region; None where a size is not known beforehand."""
    tensors = [*inputs.values(), *outputs.values()]
    return tensors if all(tensor.is_static for tensor in tensors) else None
