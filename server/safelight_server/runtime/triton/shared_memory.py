"""Shared-memory regions for tensors between the gateway and one Triton server, reused from call to call.

A region has room for the inputs and outputs of a model's largest batch, at one
size of pictures where the model has several. The
server writes the results of a call into the region whenever it gets to it, even
if the call was given up long ago, for example after the process was suspended.

Invariant: a region is used for a call only if the server has answered every
earlier call in that region. The region of an unanswered call is in quarantine.
It is reused when the server answers. If instead the server no longer knows the
region, it has restarted, and the process that could write into the region is
gone: the region is then unlinked, never reused.

Input rows that stay the same from call to call (`StableRows`) keep their
position in the region and are copied only if the position held another row.
A position that nothing was written to holds zeros.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from safelight_server.domain.tensors import FloatArray
from safelight_server.runtime.base import Inputs, StableRows
from safelight_server.runtime.triton.client import CallFailed, Trouble
from safelight_server.runtime.triton.models import ModelKey, ServedModel, Shapes, Tensor

log = structlog.get_logger(__name__)

UNREGISTER_PAUSES_S = (0.0, 0.02, 0.1, 0.5, 1.0)

RegionKey = tuple[ModelKey, Shapes]
"""A model, and the shapes of its open inputs."""
ALIGNMENT_BYTES = 64
FOLDER = Path("/dev/shm")  # where Linux keeps POSIX shared memory


class Registrar(Protocol):
    """Registers regions with a server; `client.Client` implements it."""

    async def register(self, name: str, key: str, num_bytes: int, timeout_s: float) -> None:
        """Registers a region with the server, so that calls can refer to it."""

    async def unregister(self, name: str, timeout_s: float) -> None:
        """Unregisters a region from the server."""


@dataclass(frozen=True, slots=True)
class Place:
    """Byte offset of a tensor in a region, and bytes of each of its rows."""

    offset: int
    row_bytes: int


UNKNOWN = -1
"""Stands for rows without a version, such as those that a model is tried with; 0 stands for zeros."""


def place(held: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Assigns the rows of a batch to positions, so that a row whose version is in the region already stays there.

    Args:
        held: (N,) version at each position of the region; 0 for an empty position, `UNKNOWN` for a row without one.
        wanted: (B,) version of each row of the batch.

    Returns:
        (B,) the position of each row, each of 0 … B - 1 once.
    """
    count = len(wanted)
    at = {version: position for position, version in enumerate(held[:count].tolist()) if version}
    places = [at.pop(version, -1) for version in wanted.tolist()]
    left = iter(sorted(set(range(count)).difference(places)))
    return np.array([next(left) if position < 0 else position for position in places], np.intp)


class Region:
    """A piece of shared memory laid out for the batches of one model at one size.

    Raises:
        OSError: /dev/shm has no room for it.
    """

    def __init__(self, name: str, use: RegionKey, tensors: Sequence[Tensor], max_rows: int) -> None:
        self.name = name
        self.key = f"/{name}"
        self.use = use
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
        """Copies a batch into the region; rows of `StableRows` only if the region does not hold them yet.

        Returns:
            (B,) the position of each row.
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
                if stale.size:
                    view[places[stale]] = rows.take(stale)
                held[places[stale]] = rows.versions[stale]
            else:
                view[places] = rows.reshape(len(rows), *view.shape[1:])
                self._held[name][places] = UNKNOWN
        return places

    def read(self, name: str, places: npt.NDArray[np.intp]) -> FloatArray:
        """A copy of an output's rows, (B, ...) float32, at the positions that `write` returned."""
        rows: FloatArray = self._views[name][places]
        return rows

    def unlink(self) -> None:
        """Frees the memory. A server that still has it mapped can go on writing, but into memory that nobody reads."""
        self._views = {}
        self._memory.close()
        self._memory.unlink()


class RegionPool:
    """The regions of one server.

    Args:
        max_quarantined: with so many regions in quarantine, no new region is made.
        timeout_s: timeout in seconds of a registration.
    """

    def __init__(self, registrar: Registrar, *, max_quarantined: int, timeout_s: float) -> None:
        self._registrar = registrar
        self._max_quarantined = max_quarantined
        self._timeout_s = timeout_s
        self._prefix = f"safelight-{os.getpid()}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        self._idle: defaultdict[RegionKey, list[Region]] = defaultdict(list)
        self._busy: set[Region] = set()
        self._quarantine: set[Region] = set()
        self._forgotten: set[Region] = set()

    @property
    def num_regions(self) -> int:
        """Number of regions: idle, in use and in quarantine."""
        return sum(map(len, self._idle.values())) + len(self._busy) + len(self._quarantine)

    @property
    def num_quarantined(self) -> int:
        """Number of regions whose call was given up and has not been answered."""
        return len(self._quarantine)

    async def take(self, use: RegionKey, tensors: Sequence[Tensor], max_rows: int) -> Region | None:
        """Takes an idle region for a call, or makes and registers a new one.

        Returns:
            None if /dev/shm is full or too many regions are in quarantine.

        Raises:
            CallFailed: the server did not register the region.
        """
        if idle := self._idle[use]:
            region = idle.pop()
            self._busy.add(region)
            return region
        if len(self._quarantine) >= self._max_quarantined:
            return None
        try:
            region = Region(f"{self._prefix}-{next(self._numbers)}", use, tensors, max_rows)
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
        """Returns a region whose call the server has answered; it can be used again."""
        self._busy.discard(region)
        self._quarantine.discard(region)
        if region in self._forgotten:
            self._forgotten.remove(region)
            region.unlink()
        else:
            self._idle[region.use].append(region)

    def quarantine(self, region: Region) -> None:
        """Sets aside a region whose call was given up or lost its connection: the server may still write into it."""
        self._busy.remove(region)
        self._quarantine.add(region)

    def known(self, names: set[str]) -> None:
        """Unlinks the regions that the server does not know (`names`): they were registered before it restarted."""
        for use, regions in self._idle.items():
            gone = [region for region in regions if region.name not in names]
            self._idle[use] = [region for region in regions if region.name in names]
            for region in gone:
                region.unlink()
        for region in [region for region in self._quarantine if region.name not in names]:
            self._quarantine.remove(region)
            self._forgotten.discard(region)
            region.unlink()
        self._forgotten |= {region for region in self._busy if region.name not in names}

    async def close(self) -> None:
        """Frees all regions. Those that the server may still write into are unlinked, but not unregistered."""
        idle = [region for regions in self._idle.values() for region in regions]
        self._idle.clear()
        try:
            await self._unregister([region.name for region in idle])
        finally:
            for region in [*idle, *self._busy, *self._quarantine]:
                region.unlink()
            self._busy.clear()
            self._quarantine.clear()

    async def _unregister(self, names: Sequence[str]) -> None:
        """Unregisters regions. Triton refuses for a moment after an answer, when a region is still in use."""
        for pause_s in UNREGISTER_PAUSES_S:
            await asyncio.sleep(pause_s)
            failures: dict[str, CallFailed] = {}
            for name in names:
                try:
                    await self._registrar.unregister(name, self._timeout_s)
                except CallFailed as failure:
                    failures[name] = failure
                    if failure.trouble is not Trouble.FAILED:
                        break  # the server has gone, or does not answer
            if not failures:
                return
            names = list(failures)
            if any(failure.trouble is not Trouble.FAILED for failure in failures.values()):
                break
        log.info("not_unregistered", regions=names, error=str(failures[names[0]]))


def layout(model: ServedModel) -> list[Tensor] | None:
    """The tensors that a region has to hold; None if a shape is open."""
    tensors = [*model.inputs.values(), *model.outputs.values()]
    return tensors if all(tensor.is_static for tensor in tensors) else None
