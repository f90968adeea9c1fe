"""Which generation a request id stands for: bounded in time and number. Pure, but for the clock it is given."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from safelight_server.errors import AlreadyExistsError, QueueFullError
from safelight_server.identity import Caller


@dataclass(slots=True)
class _Entry:
    body_digest: bytes
    generation_id: str
    until: float


class Idempotency:
    """Remembers request ids of a tenant: while their generation runs, and `ttl_s` after its end."""

    def __init__(self, ttl_s: float, clock: Callable[[], float], max_entries: int = 100_000) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._max_entries = max_entries
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()

    def find(self, caller: Caller, request_id: str, body_digest: bytes) -> str | None:
        """The generation that a request id stands for, or None.

        Raises:
            AlreadyExistsError: it stands for another request.
        """
        entry = self._entries.get((caller.tenant, request_id))
        if entry is None or entry.until <= self._clock():
            return None
        if entry.body_digest != body_digest:
            raise AlreadyExistsError(f"request_id {request_id} was used with another request; choose a new one")
        return entry.generation_id

    def remember(self, caller: Caller, request_id: str, body_digest: bytes, generation_id: str) -> None:
        """Binds a request id; entries that have ended make room, the oldest first.

        Raises:
            QueueFullError: every entry's generation still runs.
        """
        if len(self._entries) >= self._max_entries:
            ended = next((key for key, entry in self._entries.items() if entry.until < math.inf), None)
            if ended is None:
                raise QueueFullError("too many request ids are in use", reason="TOO_MANY_REQUEST_IDS", retry_after_s=1)
            del self._entries[ended]
        self._entries[caller.tenant, request_id] = _Entry(body_digest, generation_id, math.inf)

    def ended(self, caller: Caller, request_id: str) -> None:
        """The generation has ended: from now on the time runs."""
        now = self._clock()
        if (entry := self._entries.get((caller.tenant, request_id))) is not None:
            entry.until = now + self._ttl_s
            self._entries.move_to_end((caller.tenant, request_id))
        while self._entries and next(iter(self._entries.values())).until <= now:
            self._entries.popitem(last=False)
