"""Maps request ids to generations, so that a retry starts no second one; bounded in time and number. No I/O.

An id is known from `remember` until `ttl_s` after `ended`, or until `release`.
When too many have ended, the tenant that holds most of those loses the id that
ended first, before its time; ids of generations that have not ended are never dropped.
Between `find` and `remember` the caller must not await: otherwise two equal requests
could both start a generation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import AlreadyExistsError, QueueFullError
from safelight_server.generations.tenant_shares import TenantShares

_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _KnownRequest:
    body_digest: bytes
    generation_id: str


class Idempotency:
    """The request ids of all tenants.

    Args:
        ttl_s: how long an id is known after the end of its generation.
        clock: monotonic seconds.
        max_entries: bound on the ids whose generations have not ended, and on those whose generations have.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float], max_entries: int = 100_000) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._max_entries = max_entries
        self._live: dict[_Key, _KnownRequest] = {}
        self._ended: OrderedDict[_Key, tuple[_KnownRequest, float]] = OrderedDict()  # with its expiry, earliest first
        self._shares: TenantShares[_Key] = TenantShares(max_entries)

    def __len__(self) -> int:
        return len(self._live) + len(self._ended)

    def knows(self, caller: Caller, request_id: str) -> bool:
        """Whether a generation was started with a request id, by whatever request."""
        self._drop_expired()
        key = (caller.tenant, request_id)
        return key in self._live or key in self._ended

    def find(self, caller: Caller, request_id: str, body_digest: bytes) -> str | None:
        """The id of the generation that was started with a request id, or None.

        Raises:
            AlreadyExistsError: the id was used with another request (another `body_digest`).
        """
        self._drop_expired()
        key = (caller.tenant, request_id)
        entry = self._live.get(key) or self._ended.get(key, (None,))[0]
        if entry is None:
            return None
        if entry.body_digest != body_digest:
            raise AlreadyExistsError(
                f"request_id {request_id} was used with another request; choose a new one",
                metadata={"request_id": request_id, "generation": f"generations/{entry.generation_id}"},
            )
        return entry.generation_id

    def remember(self, caller: Caller, request_id: str, body_digest: bytes, generation_id: str) -> None:
        """Adds a request id that `find` did not know.

        Raises:
            QueueFullError: too many generations with a request id have not ended.
        """
        if len(self._live) >= self._max_entries:
            raise QueueFullError(
                f"{len(self._live)} generations with a request_id have not ended",
                reason="TOO_MANY_REQUEST_IDS",
                metadata={"bound": "request_ids", "subject": "the server", "limit": str(self._max_entries)},
                retry_after_s=1.0,
            )
        self._live[caller.tenant, request_id] = _KnownRequest(body_digest, generation_id)

    def ended(self, caller: Caller, request_id: str) -> None:
        """Starts the time to live of an id whose generation has ended. Unknown ids are ignored."""
        key = (caller.tenant, request_id)
        if (entry := self._live.pop(key, None)) is None:
            return
        self._drop_expired()
        self._ended[key] = entry, self._clock() + self._ttl_s
        self._shares.add(caller.tenant, key)
        while (beyond := self._shares.take_beyond()) is not None:
            self._drop(beyond)

    def release(self, caller: Caller, request_id: str) -> None:
        """Drops an id whose generation has no outcome: a retry starts a new generation. Unknown ids are ignored."""
        self._live.pop((caller.tenant, request_id), None)

    def forget(self, caller: Caller, request_id: str, generation_id: str) -> None:
        """Drops the id of a generation whose outcome another replica decides. Ids of other generations stay."""
        key = (caller.tenant, request_id)
        if (entry := self._live.get(key)) is not None and entry.generation_id == generation_id:
            del self._live[key]
        if (ended := self._ended.get(key)) is not None and ended[0].generation_id == generation_id:
            self._drop(key)

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._ended and next(iter(self._ended.values()))[1] <= now:
            self._drop(next(iter(self._ended)))

    def _drop(self, key: _Key) -> None:
        del self._ended[key]
        self._shares.remove(key[0], key)
