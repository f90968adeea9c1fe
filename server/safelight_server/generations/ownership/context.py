"""What owners and mirrors of generations use: coordination, tiers, keys, times to live."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from safelight_server.cache.namespaces import Namespaces
from safelight_server.cluster.bulletin import Bulletin
from safelight_server.cluster.journal_rules import GIVE_UP_S
from safelight_server.cluster.records import GenerationRecord
from safelight_server.coordination.base import Coordinator
from safelight_server.generations.generation import Generation
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.purge import EntryOwner
from safelight_server.storage.sealed import Sealer
from safelight_server.storage.tiers import Tiers

log = structlog.get_logger(__name__)

WANT, CANCEL, PRIORITY = "want", "cancel", "priority"
"""Kinds of messages about a generation on the bulletin."""


class GenerationHost(Protocol):
    """The registry of generations on this replica, as ownership needs it."""

    def revive(self, record: GenerationRecord) -> Generation:
        """Makes a generation as it was accepted elsewhere; nothing runs yet."""

    def owned(self, generation: Generation) -> bool:
        """Called when this replica has become the owner. Returns whether the generation runs, or waits for a stream."""

    def wanted(self, identifier: str) -> None:
        """Called when another replica has a stream for a generation that this one owns."""

    def moved(self, generation: Generation) -> None:
        """Called when another replica has become the owner."""


@dataclass(frozen=True, slots=True)
class ClusterContext:
    """Everything that owners and mirrors share.

    Attributes:
        ttl_s: how long a lease lasts unless it is renewed.
        result_ttl_s: how long a finished generation can be watched again.
        idempotency_ttl_s: how long a request id is remembered after the end.
    """

    coordinator: Coordinator
    sealer: Sealer
    keyring: Keyring
    tiers: Tiers
    namespaces: Namespaces
    bulletin: Bulletin
    ttl_s: float
    result_ttl_s: float
    idempotency_ttl_s: float
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def kept_s(self) -> float:
        """How long the events of a finished generation are kept."""
        return max(self.result_ttl_s, self.idempotency_ttl_s)

    @property
    def artifact_s(self) -> float:
        """How long a finished picture is kept for streams on other replicas, while its generation may still go on."""
        return max(self.result_ttl_s, GIVE_UP_S)

    def name(self, identifier: str) -> str:
        """A generation's name in Redis."""
        return self.keyring.digest("generation", identifier)

    def owner(self, generation: Generation) -> EntryOwner:
        """The properties by which a purge finds what is kept of a generation."""
        namespace = self.namespaces.of(generation.caller.tenant)
        return self.namespaces.owner(namespace, generation.request.spec.model_revision, generation.name)

    def artifact_key(self, generation: Generation, index: int) -> str:
        """The key of the finished picture of an output, as its streams get it."""
        prefix = self.namespaces.of(generation.caller.tenant).prefix
        return f"{prefix}/artifact/{self.namespaces.private(generation.name, index)}"

    def start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Runs a coroutine in the background. An exception from it is a bug."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("bug", exc_info=fault)
