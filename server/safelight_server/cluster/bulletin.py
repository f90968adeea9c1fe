"""Short messages between replicas: who follows an execution, who has a stream for a generation, what is cancelled.

Messages only make things quicker: a replica that misses one finds out the same
when a lease ends. Messages are sealed, since they name generations.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping

import structlog

from safelight_server.coordination.base import BEGINNING, Coordinator, StreamEvent
from safelight_server.storage.base import StoreError
from safelight_server.storage.sealed import CorruptError, Entry, Sealer, UnreadableError

log = structlog.get_logger(__name__)

STREAM = "news"
KEPT_S = 300.0
RETRY_S = 0.5
MAX_WAITING = 1024

Handler = Callable[[str, Mapping[str, str]], None]
"""Called with what a message is about (a name or an id) and with its facts."""


class Bulletin:
    """Publishes to all replicas and calls the subscribers of this one. Run `listen` and `talk` as tasks."""

    def __init__(self, coordinator: Coordinator, sealer: Sealer) -> None:
        self._coordinator = coordinator
        self._sealer = sealer
        self._handlers: dict[str, Handler] = {}
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING)

    def subscribe(self, kind: str, handler: Handler) -> None:
        """Calls `handler` for every message of a kind, also for this replica's own."""
        self._handlers[kind] = handler

    def publish(self, kind: str, about: str, **facts: str) -> None:
        """Queues a message for all replicas. The message is dropped when too many wait."""
        data = json.dumps({"kind": kind, "about": about} | facts).encode()
        if not self._waiting.full():
            self._waiting.put_nowait(self._sealer.seal(STREAM, Entry(data), self._sealer.now() + KEPT_S))

    async def talk(self) -> None:
        """Sends the queued messages. Never returns."""
        while True:
            data = await self._waiting.get()
            try:
                await self._coordinator.append(STREAM, data)
            except StoreError:
                await asyncio.sleep(RETRY_S)

    async def listen(self) -> None:
        """Calls the handlers for messages that arrive from now on. Never returns."""
        while True:
            try:
                before = await self._coordinator.read(STREAM)
                break
            except StoreError:
                await asyncio.sleep(RETRY_S)
        async for event in self._coordinator.follow(STREAM, before[-1].place if before else BEGINNING, leader=False):
            try:
                self._deliver(event)
            except (CorruptError, UnreadableError):
                log.warning("news that cannot be read", place=event.place)
            except Exception:  # a fault in one message must not stop the delivery of the others
                log.exception("bug", place=event.place)

    def _deliver(self, event: StreamEvent) -> None:
        entry, expires_at = self._sealer.open(STREAM, event.data)
        facts = json.loads(entry.data)
        handler = self._handlers.get(facts.pop("kind"))
        if handler is not None and expires_at > self._sealer.now():
            handler(facts.pop("about"), facts)
