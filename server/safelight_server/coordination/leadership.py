"""A lease that is renewed while its work runs, and the commit of that work, through outages of Redis.

    leader = await Leadership.take(coordinator, name, ttl_s)     None: another replica holds the lease, follow it
    ... leader.publish(event) ...                                True: readers at other replicas see it
    outcome = await leader.commit(pointer, bill, give_up_s)
    await leader.close()

`lost` is set for good when another replica has held the lease since, even if the
lease is free again. An outage alone loses nothing: the lease is renewed when
Redis is back, also if it ran out and nobody took it. Meanwhile the work goes on
for the watchers of this replica. Code that decides without a write checks
`held` first.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable

from safelight_server.coordination.base import CommitOutcome, Coordinator, FencedError, Lease, Renewal
from safelight_server.storage.base import StoreError
from safelight_server.telemetry.background import keep_running

RENEWALS_PER_TTL = 3
"""Renewals within the time of a lease. The lease ends when so many in a row fail."""


class Leadership:
    """A lease that this process holds; made by `take`.

    Attributes:
        lost: set once another replica has held the lease since.
        forgotten: whether a renewal found that Redis has lost its data; `on_forgotten` is called then.
    """

    def __init__(self, coordinator: Coordinator, lease: Lease, ttl_s: float, since: float) -> None:
        self.lease = lease
        self._renewed_at = since
        self.lost = asyncio.Event()
        self.forgotten = False
        self.on_forgotten: Callable[[], None] = lambda: None
        self._coordinator = coordinator
        self._ttl_s = ttl_s
        self._call_lock = asyncio.Lock()
        self._over = False
        self._renewals = asyncio.create_task(keep_running(self._keep_renewing, f"lease of {lease.name}"))

    @classmethod
    async def take(cls, coordinator: Coordinator, name: str, ttl_s: float) -> Leadership | None:
        """Takes the lease. None if another replica holds it or a result is committed.

        Raises:
            StoreError: Redis does not answer.
        """
        since = time.monotonic()
        lease = await coordinator.acquire(name, secrets.token_hex(8), ttl_s)
        return None if lease is None else cls(coordinator, lease, ttl_s, since)

    @property
    def held(self) -> bool:
        """Whether the lease cannot have ended yet: its last renewal was sent less than its time to live ago."""
        return not self.lost.is_set() and time.monotonic() - self._renewed_at < self._ttl_s

    async def confirm(self) -> bool:
        """Renews the lease. False if another replica has held it since.

        Raises:
            StoreError: Redis does not answer.
        """
        async with self._call_lock:
            return await self._renew()

    async def publish(self, data: bytes) -> bool:
        """Appends an event. False if readers at other replicas do not see it: in an outage, or if another one leads."""
        try:
            await self._coordinator.publish(self.lease, data)
        except FencedError:
            with contextlib.suppress(StoreError):
                await self.confirm()
            return False
        except StoreError:
            return False
        return True

    async def commit(self, pointer: str, bill: bytes, give_up_s: float) -> CommitOutcome | None:
        """Commits, and waits up to `give_up_s` through an outage. None if the commit was discarded and not billed.

        A commit whose answer was lost is sent again and has the same result: nothing is billed twice.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(give_up_s):
                while True:
                    try:
                        async with self._call_lock:
                            outcome = await self._coordinator.commit(self.lease, pointer, bill)
                            self._over = outcome is not CommitOutcome.FENCED
                            if self._over or not await self._renew():
                                return outcome
                    except StoreError:
                        await asyncio.sleep(min(self._ttl_s / RENEWALS_PER_TTL, 0.5))
        return None

    async def close(self) -> None:
        """Stops the renewals and releases the lease, if Redis can be reached."""
        self._renewals.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._renewals
        with contextlib.suppress(StoreError):
            await self._coordinator.release(self.lease)

    async def _keep_renewing(self) -> None:
        while not self.lost.is_set():
            await asyncio.sleep(self._ttl_s / RENEWALS_PER_TTL)
            with contextlib.suppress(StoreError):
                async with self._call_lock:
                    if not self._over:
                        await self._renew()

    async def _renew(self) -> bool:
        sent_at = time.monotonic()
        # never acquired anew: another replica that has held the lease meanwhile may have ended the work
        if not self.lost.is_set() and (renewal := await self._coordinator.renew(self.lease, self._ttl_s)):
            self._renewed_at = sent_at
            if renewal is Renewal.FORGOTTEN:
                self.forgotten = True
                self.on_forgotten()
            return True
        self.lost.set()
        return False
