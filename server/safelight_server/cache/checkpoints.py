"""Checkpoints: latents of an execution after some of its steps, to resume from or to start other outputs from.

This module decides which steps are stored, and defines the byte format. Each checkpoint of an execution is one entry;
another entry lists their steps. One writer at a time is assumed, the execution's owner. If two overlap, a step may be
missing from the list, which only costs computation.

A running execution keeps its newest checkpoint, to resume from, and its anchors: the checkpoints at certain fractions
of its steps, from which other outputs may start. An ended execution keeps only the anchors. If no replica could resume
a running execution, only the anchors are made. They are held in memory until the execution has its picture, because
writing them between the steps would take a fiftieth of the steps' time.
"""

from __future__ import annotations

import functools
import math
import struct
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from safelight_server.engine.latents import Snapshot
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.purge import EntryOwner, PurgeScope
from safelight_server.storage.sealed import Entry
from safelight_server.storage.tiers import Tiers

MAGIC = b"SLP1"
_HEADER = struct.Struct("<4sIIII")
_MAX_EDGE = 1 << 16
_FLOAT = np.dtype("<f4")
HELD_BYTES = 64 << 20
"""Most bytes of snapshots held until their executions end, cancelled ones included; the oldest are dropped first."""


class CheckpointError(Exception):
    """The bytes are not a snapshot that `dump` wrote."""


def num_bytes(latent_shape: tuple[int, ...]) -> int:
    """Returns the size of a snapshot that `dump` writes, for a latent of shape (C, h, w)."""
    return _HEADER.size + 2 * math.prod(latent_shape) * _FLOAT.itemsize


def dump(snapshot: Snapshot) -> bytes:
    """Encodes a snapshot: magic, then step, C, h, w as uint32, then x and denoised as float32; all little-endian."""
    header = _HEADER.pack(MAGIC, snapshot.step, *snapshot.x.shape)
    return b"".join((header, *(np.asarray(array, _FLOAT).tobytes() for array in (snapshot.x, snapshot.denoised))))


def parse(data: bytes) -> Snapshot:
    """Decodes the snapshot that `dump` wrote, bit for bit.

    Raises:
        CheckpointError: `dump` did not write these bytes.
    """
    if len(data) < _HEADER.size:
        raise CheckpointError("it is too short")
    magic, step, *shape = _HEADER.unpack_from(data)
    if magic != MAGIC or not all(0 < edge <= _MAX_EDGE for edge in shape):
        raise CheckpointError("no header")
    count = math.prod(shape)
    if len(data) != _HEADER.size + 2 * count * _FLOAT.itemsize:
        raise CheckpointError("its length is not that of its shape")
    arrays = np.frombuffer(data, _FLOAT, 2 * count, _HEADER.size).astype(np.float32).reshape(2, *shape)
    return Snapshot(step, arrays[0], arrays[1])


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """Decides after which steps a checkpoint is stored.

    Attributes:
        every_n_steps: interval of checkpoints to resume from, and so the most steps that a crash costs; 0: none, if no
            replica could resume.
        fractions: of all steps; the anchor of each is the last step that does not exceed it.
        max_bytes: larger snapshots are not stored.
        ttl_s: seconds until a checkpoint expires.
    """

    every_n_steps: int = 5
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    max_bytes: int = 8 << 20
    ttl_s: float = 86_400.0

    def anchors(self, num_steps: int) -> frozenset[int]:
        """Returns the steps from which other outputs may start."""
        return _anchors(self.fractions, num_steps)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Returns whether to store the latent after `step` steps. The last is never stored, as the picture follows."""
        often = self.every_n_steps > 0 and step % self.every_n_steps == 0
        return 0 < step < num_steps and (often or step in self.anchors(num_steps))

    def left_bytes(self, num_steps: int, latent_shape: tuple[int, ...]) -> int:
        """Returns the bytes of all checkpoints that remain after an execution has ended."""
        one = num_bytes(latent_shape)
        return len(self.anchors(num_steps)) * one if one <= self.max_bytes else 0

    def useless(self, kept: Collection[int], num_steps: int, ended: bool) -> set[int]:
        """Returns the stored steps that are no longer needed."""
        newest = set() if ended or not kept or not self.every_n_steps else {max(kept)}
        return set(kept) - self.anchors(num_steps) - newest


@dataclass(slots=True)
class _UnwrittenSnapshots:
    """Snapshots of an execution that wait to be written, by step; dropped at `until` (`time.monotonic`)."""

    owner: EntryOwner
    until: float
    snapshots: dict[int, Snapshot] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Their size as `dump` writes them."""
        return sum(num_bytes(snapshot.x.shape) for snapshot in self.snapshots.values())


class Checkpoints:
    """Stores and reads the checkpoints of all executions.

    The methods take plain names of `tenant` and `execution`; store keys hold only HMACs of them.
    """

    MAX_LISTS = 4096

    def __init__(self, tiers: Tiers, keyring: Keyring, policy: CheckpointPolicy) -> None:
        self.policy = policy
        self._tiers = tiers
        self._keyring = keyring
        self._lists: OrderedDict[str, set[int]] = OrderedDict()
        self._held: OrderedDict[str, _UnwrittenSnapshots] = OrderedDict()
        self._held_bytes = 0

    @property
    def holds(self) -> bool:
        """Whether to call `hold` instead of `keep`: snapshots stay in memory until the execution has its picture."""
        return not self.policy.every_n_steps

    def hold(self, tenant: str, execution: str, snapshot: Snapshot, owner: EntryOwner) -> bool:
        """Holds a snapshot in memory until `ended`. False if it is too large or not finite.

        Args:
            owner: the properties by which purges find the snapshot.
        """
        size = num_bytes(snapshot.x.shape)
        if size > self.policy.max_bytes or not _is_finite(snapshot):
            return False
        key = self._key(tenant, execution, "steps")
        held = self._holding(key) or self._held.setdefault(
            key, _UnwrittenSnapshots(owner, time.monotonic() + self.policy.ttl_s)
        )
        self._held_bytes += 0 if snapshot.step in held.snapshots else size
        held.snapshots[snapshot.step] = snapshot
        while self._held_bytes > HELD_BYTES:
            self._drop_held(next(iter(self._held)))
        return True

    async def keep(
        self,
        tenant: str,
        execution: str,
        snapshot: Snapshot,
        num_steps: int,
        *,
        revision: str = "",
        generation: str = "",
        replicate: bool = False,
    ) -> bool:
        """Stores a snapshot and deletes the older ones that are no longer needed.

        Args:
            num_steps: the number of steps of the execution.
            revision, generation: the properties by which purges find the snapshot.
            replicate: wait until a shared tier has stored it.

        Returns:
            Whether it is stored, or with `replicate` whether other replicas can read it. False if it is too large or
            not finite.
        """
        if num_bytes(snapshot.x.shape) > self.policy.max_bytes or not _is_finite(snapshot):
            return False
        tags = (self._keyring.tag("revision", revision), self._keyring.tag("generation", generation))
        key = self._key(tenant, execution, snapshot.step)
        replicated = await self._tiers.put(key, Entry(dump(snapshot), {}, *tags), self.policy.ttl_s, replicate)
        steps = await self._steps(tenant, execution)
        steps.add(snapshot.step)
        safe = replicated or not replicate
        gone = self.policy.useless(steps, num_steps, ended=False) if safe else set()
        steps -= gone
        listed = await self._list(tenant, execution, steps, tags, replicate)
        for step in gone:
            await self._tiers.delete(self._key(tenant, execution, step))
        return replicated and listed if replicate else True

    async def ended(self, tenant: str, execution: str, num_steps: int, owner: EntryOwner) -> None:
        """Records that the execution has its picture: writes held snapshots and deletes all but the anchors."""
        key, tags = self._key(tenant, execution, "steps"), (owner.revision, owner.generation)
        held = dict(holding.snapshots) if (holding := self._holding(key)) is not None else {}
        for step, snapshot in held.items():
            entry = Entry(dump(snapshot), {}, *tags)
            await self._tiers.put(self._key(tenant, execution, step), entry, self.policy.ttl_s)
        own = self._lists.get(key, set()) | held.keys()
        found = await self._tiers.get(key, fresh=True)
        listed = set() if found is None else _unpacked(found.entry.data)
        gone = self.policy.useless(own | listed, num_steps, ended=True)
        steps = (own | listed) - gone
        if steps != listed:
            await self._list(tenant, execution, steps, tags, replicate=False)
        for step in gone:
            await self._tiers.delete(self._key(tenant, execution, step))
        self._lists.pop(key, None)
        self._drop_held(key)

    async def newest(self, tenant: str, execution: str) -> Snapshot | None:
        """Returns the latest checkpoint that can be read, or None."""
        return await self.at_or_before(tenant, execution, 1 << 31)

    async def at_or_before(self, tenant: str, execution: str, step: int) -> Snapshot | None:
        """Returns the latest checkpoint at or before `step` that can be read, or None."""
        held = self._holding(self._key(tenant, execution, "steps"))
        for kept in sorted(await self._steps(tenant, execution), reverse=True):
            if kept <= step:
                if held is not None and kept in held.snapshots:
                    return held.snapshots[kept]
                found = await self._tiers.get(self._key(tenant, execution, kept))
                if found is not None:
                    return parse(found.entry.data)
        return None

    async def steps(self, tenant: str, execution: str) -> list[int]:
        """Returns the listed steps, rising. A listed checkpoint may have been evicted."""
        return sorted(await self._steps(tenant, execution))

    async def gone(self, tenant: str, execution: str) -> bool:
        """Whether every tier confirms that nothing is stored of the execution. False if a tier fails."""
        key = self._key(tenant, execution, "steps")
        return self._holding(key) is None and await self._tiers.gone(key)

    async def put(self, key: str, snapshot: Snapshot, owner: EntryOwner) -> bool:
        """Stores a snapshot under a given store key. Returns whether other replicas can read it."""
        entry = Entry(dump(snapshot), {}, owner.revision, owner.generation)
        return await self._tiers.put(key, entry, self.policy.ttl_s, replicate=True)

    async def get(self, key: str) -> Snapshot | None:
        """Returns the snapshot under a store key, or None if there is none.

        Raises:
            StoreError: a shared tier failed, and may have the snapshot.
        """
        found = await self._tiers.get(key, sure=True)
        return None if found is None else parse(found.entry.data)

    async def delete(self, tenant: str, execution: str) -> bool:
        """Deletes an execution's checkpoints. False if a tier failed."""
        keys = [self._key(tenant, execution, step) for step in await self._steps(tenant, execution)]
        keys.append(self._key(tenant, execution, "steps"))
        self._lists.pop(keys[-1], None)
        self._drop_held(keys[-1])
        return all([await self._tiers.delete(key) for key in keys])

    async def forget(self, scope: PurgeScope) -> bool:
        """Drops held snapshots that were purged and, for a purge by tenant, the lists of steps in memory.

        Other purges leave the lists: their steps lead to entries that are gone, which is a miss.
        """
        for key, held in list(self._held.items()):
            if scope.includes(EntryOwner(key, held.owner.revision, held.owner.generation)):
                self._drop_held(key)
        if scope.by_name:
            for key in [key for key in self._lists if key.startswith(scope.prefix)]:
                del self._lists[key]
        return True

    async def _steps(self, tenant: str, execution: str) -> set[int]:
        key = self._key(tenant, execution, "steps")
        found = await self._tiers.get(key, fresh=True)
        own = set(self._lists.get(key, ()))
        if (held := self._holding(key)) is not None:
            own.update(held.snapshots)
        return own if found is None else own | _unpacked(found.entry.data)

    def _holding(self, key: str) -> _UnwrittenSnapshots | None:
        if (held := self._held.get(key)) is not None and held.until <= time.monotonic():
            self._drop_held(key)
        return self._held.get(key)

    def _drop_held(self, key: str) -> None:
        """Drops the held snapshots of an execution."""
        if (held := self._held.pop(key, None)) is not None:
            self._held_bytes -= held.num_bytes

    async def _list(
        self, tenant: str, execution: str, steps: set[int], tags: tuple[bytes, bytes], replicate: bool
    ) -> bool:
        key = self._key(tenant, execution, "steps")
        self._lists[key] = set(steps)
        self._lists.move_to_end(key)
        if len(self._lists) > self.MAX_LISTS:
            self._lists.popitem(last=False)
        data = struct.pack(f"<{len(steps)}I", *sorted(steps))
        return await self._tiers.put(key, Entry(data, {}, *tags), self.policy.ttl_s, replicate)

    def _key(self, tenant: str, execution: str, step: int | str) -> str:
        return f"{self._keyring.tenant(tenant)}/checkpoint/{self._keyring.digest('execution', execution)}.{step}"


def _is_finite(snapshot: Snapshot) -> bool:
    return bool(np.isfinite(snapshot.x).all() and np.isfinite(snapshot.denoised).all())


def _unpacked(data: bytes) -> set[int]:
    return {step for (step,) in struct.iter_unpack("<I", data)}


@functools.lru_cache(1024)
def _anchors(fractions: tuple[float, ...], num_steps: int) -> frozenset[int]:
    steps = (math.floor(fraction * num_steps + 1e-9) for fraction in fractions)
    return frozenset(step for step in steps if 0 < step < num_steps)
