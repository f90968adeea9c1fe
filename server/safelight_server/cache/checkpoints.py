"""Checkpoints: latents of executions at some of their steps, for the latent cache, resuming and branching.

Owns which steps are kept and how a snapshot is written. An execution's
checkpoints are entries of their own beside a list of their steps. One writer at
a time is assumed, the execution's leader: where two overlap, a step may be
missing from the list, which costs computation and nothing else.

While it runs, an execution keeps its newest checkpoint, to resume from, and
those nearest to the fractions of its steps from which others may start; when it
has ended, only the latter. Where nobody could go on from a running execution,
there are only the latter, held in this process and written when it has its
picture: written one by one between the steps they cost a fiftieth of these.
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
"""Of snapshots that wait for their executions to end, cancelled ones among them; beyond, the oldest are given up."""


class CheckpointError(Exception):
    """Bytes that are no snapshot."""


def num_bytes(latent_shape: tuple[int, ...]) -> int:
    """Of what `dump` makes."""
    return _HEADER.size + 2 * math.prod(latent_shape) * _FLOAT.itemsize


def dump(snapshot: Snapshot) -> bytes:
    """A snapshot as bytes: magic, step, C, h, w as uint32, then x and denoised as float32, all little-endian."""
    header = _HEADER.pack(MAGIC, snapshot.step, *snapshot.x.shape)
    return b"".join((header, *(np.asarray(array, _FLOAT).tobytes() for array in (snapshot.x, snapshot.denoised))))


def parse(data: bytes) -> Snapshot:
    """The snapshot that `dump` wrote, bit for bit.

    Raises:
        CheckpointError: it did not.
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
    """Which steps are kept.

    Attributes:
        every_n_steps: how often a running execution's state is kept, so that a crash costs at most so many steps;
            0: never, where nobody could go on from it.
        fractions: of all steps, from which others may start; the nearest step below or at each is kept.
        max_bytes: snapshots above are not kept at all.
        ttl_s: how long.
    """

    every_n_steps: int = 5
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    max_bytes: int = 8 << 20
    ttl_s: float = 86_400.0

    def anchors(self, num_steps: int) -> frozenset[int]:
        """The steps from which others may start."""
        return _anchors(self.fractions, num_steps)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether the state after `step` steps is to be kept; the last one never is: the picture follows."""
        often = self.every_n_steps > 0 and step % self.every_n_steps == 0
        return 0 < step < num_steps and (often or step in self.anchors(num_steps))

    def left_bytes(self, num_steps: int, latent_shape: tuple[int, ...]) -> int:
        """Of what is left of an execution's checkpoints when it has ended, whoever made them."""
        one = num_bytes(latent_shape)
        return len(self.anchors(num_steps)) * one if one <= self.max_bytes else 0

    def useless(self, kept: Collection[int], num_steps: int, ended: bool) -> set[int]:
        """Of the kept steps, those that serve nothing any more."""
        newest = set() if ended or not kept or not self.every_n_steps else {max(kept)}
        return set(kept) - self.anchors(num_steps) - newest


@dataclass(slots=True)
class _UnwrittenSnapshots:
    """Snapshots of an execution that are not written yet, by step; given up at `until`, in `time.monotonic`."""

    owner: EntryOwner
    until: float
    snapshots: dict[int, Snapshot] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """As they will be written."""
        return sum(num_bytes(snapshot.x.shape) for snapshot in self.snapshots.values())


class Checkpoints:
    """Of all executions.

    Args:
        tenant, execution in the methods: plain names; what is stored has only their HMACs.
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
        """Whether snapshots are held until their execution has its picture: `hold` in place of `keep`."""
        return not self.policy.every_n_steps

    def hold(self, tenant: str, execution: str, snapshot: Snapshot, owner: EntryOwner) -> bool:
        """Keeps a snapshot in this process until `ended`. A latent that is not finite never is.

        Args:
            owner: what to purge it by.
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
            self._let_go(next(iter(self._held)))
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
        """Keeps a snapshot, if it is one to keep, and deletes those that it makes useless.

        Args:
            num_steps: of the execution.
            revision, generation: what to purge it by.
            replicate: wait until a tier that other replicas see has it.

        Returns:
            Whether it is kept, with `replicate` whether others see it. A latent that is not finite never is.
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
        """The execution has its picture: keeps only what others may start from."""
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
        self._let_go(key)

    async def newest(self, tenant: str, execution: str) -> Snapshot | None:
        """The checkpoint with the most steps that can be read."""
        return await self.at_or_before(tenant, execution, 1 << 31)

    async def at_or_before(self, tenant: str, execution: str, step: int) -> Snapshot | None:
        """The checkpoint with the most steps up to `step` that can be read."""
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
        """The steps of which there should be a checkpoint."""
        return sorted(await self._steps(tenant, execution))

    async def gone(self, tenant: str, execution: str) -> bool:
        """Whether nothing is kept of it for certain; a tier that cannot answer may have it."""
        key = self._key(tenant, execution, "steps")
        return self._holding(key) is None and await self._tiers.gone(key)

    async def put(self, key: str, snapshot: Snapshot, owner: EntryOwner) -> bool:
        """Keeps a snapshot under a key of its own; whether other replicas see it."""
        entry = Entry(dump(snapshot), {}, owner.revision, owner.generation)
        return await self._tiers.put(key, entry, self.policy.ttl_s, replicate=True)

    async def get(self, key: str) -> Snapshot | None:
        """The snapshot under a key; None: it is gone.

        Raises:
            StoreError: a tier that may have it cannot say.
        """
        found = await self._tiers.get(key, sure=True)
        return None if found is None else parse(found.entry.data)

    async def delete(self, tenant: str, execution: str) -> bool:
        """Deletes an execution's checkpoints; False where a tier could not be cleared."""
        keys = [self._key(tenant, execution, step) for step in await self._steps(tenant, execution)]
        keys.append(self._key(tenant, execution, "steps"))
        self._lists.pop(keys[-1], None)
        self._let_go(keys[-1])
        return all([await self._tiers.delete(key) for key in keys])

    async def forget(self, scope: PurgeScope) -> bool:
        """Lists nothing any more of a tenant that was purged; other lists lead to entries that are not there."""
        for key, held in list(self._held.items()):
            if scope.includes(EntryOwner(key, held.owner.revision, held.owner.generation)):
                self._let_go(key)
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
            self._let_go(key)
        return self._held.get(key)

    def _let_go(self, key: str) -> None:
        """Holds them no longer."""
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
