"""What the executions of this replica share: access to Redis, and which of them lead here or are followed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import structlog

from safelight_server.cache.checkpoints import Checkpoints
from safelight_server.cache.pictures import Pictures
from safelight_server.cluster.bulletin import Bulletin
from safelight_server.cluster.journal_rules import GIVE_UP_S
from safelight_server.coordination.base import Coordinator
from safelight_server.engine.engine import Engine
from safelight_server.engine.jobs import Job
from safelight_server.scheduler import Priority, ScheduledOutput
from safelight_server.storage.base import StoreError
from safelight_server.storage.sealed import Sealer

log = structlog.get_logger(__name__)

FOLLOW = "follow"
"""Kind of the message by which a replica announces that it follows an execution."""
MAX_FOLLOW_REQUESTS = 4096
"""Announcements that are remembered for executions which do not lead here yet."""
TAKEOVER_LEASES = 4
"""Lease times until a replica that takes over has found a result: two until it begins, two for the lookup."""


@dataclass(frozen=True, slots=True)
class ExecutionTicket:
    """Names of one execution.

    Attributes:
        name: the same on all replicas; an HMAC.
        pointer: the key of its pixels in the tiers.
        checkpoints: namespace and exact name of its checkpoints; None: it has none.
        tenant, generation: the tenant and the generation that are billed.
        revision: "MODEL/REVISION"; purges and the bill use it.
        disposition: where it begins, for the bill: "miss", "latent" or "branched".
        again: whether another replica may have made steps of it before.
    """

    name: str
    pointer: str
    checkpoints: tuple[str, str] | None
    tenant: str
    generation: str
    revision: str
    disposition: str
    again: bool = False


class LocalRunner(Protocol):
    """A runner that leads here. `followed` is set when another replica follows its steps."""

    ticket: ExecutionTicket
    followed: bool


class LeasedRunners:
    """All leased runners of this replica. Run `watch_service` as a task.

    Attributes:
        away: set while Redis has not been reached for longer than a lease.
        num_late: results that wait for Redis.
        asking: jobs that have not been submitted yet, since their runner still tries to get the lease.

    Args:
        ttl_s: how long a lease lasts unless it is renewed.
        result_ttl_s: how long a finished generation can be watched again.
        pool: threads for the conversion of pixels.
    """

    def __init__(
        self,
        engine: Engine,
        coordinator: Coordinator,
        sealer: Sealer,
        checkpoints: Checkpoints,
        pictures: Pictures,
        bulletin: Bulletin,
        pool: Executor,
        ttl_s: float,
        result_ttl_s: float,
    ) -> None:
        self.engine = engine
        self.coordinator = coordinator
        self.sealer = sealer
        self.checkpoints = checkpoints
        self.pictures = pictures
        self.bulletin = bulletin
        self.pool = pool
        self.ttl_s = ttl_s
        self._result_ttl_s = result_ttl_s
        self.away = asyncio.Event()
        self.num_late = 0
        self.asking: dict[object, Job] = {}
        self._follow_requests: OrderedDict[str, None] = OrderedDict()
        self._leading: dict[str, LocalRunner] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        bulletin.subscribe(FOLLOW, lambda name, _facts: self._on_follow(name))

    @property
    def private_s(self) -> float:
        """How long a result is kept that only its own generation may use.

        That is as long as the generation can be watched, and as long as an owner may still try to write it.
        """
        return max(self._result_ttl_s, GIVE_UP_S + TAKEOVER_LEASES * self.ttl_s)

    def start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Runs a coroutine of a runner in the background; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("bug", exc_info=fault)

    def leads(self, leased_runner: LocalRunner) -> None:
        """Registers a runner that leads here."""
        self._leading[leased_runner.ticket.name] = leased_runner
        if self._follow_requests.pop(leased_runner.ticket.name, 0) is None:
            leased_runner.followed = True

    def ends(self, leased_runner: LocalRunner) -> None:
        """Unregisters a runner that led here."""
        if self._leading.get(leased_runner.ticket.name) is leased_runner:
            del self._leading[leased_runner.ticket.name]

    def _on_follow(self, name: str) -> None:
        if (leased_runner := self._leading.get(name)) is not None:
            leased_runner.followed = True
            return
        self._follow_requests[name] = None
        if len(self._follow_requests) > MAX_FOLLOW_REQUESTS:
            self._follow_requests.popitem(last=False)

    async def watch_service(self) -> None:
        """Updates the shared clock. Sets `away` while Redis was not reached for longer than a lease. Never returns."""
        since: float | None = None
        while True:
            try:
                await self.coordinator.check()
                since = None
                self.away.clear()
            except StoreError:
                since = since or time.monotonic()
                if time.monotonic() - since >= self.ttl_s:
                    self.away.set()
            await asyncio.sleep(self.ttl_s / 3)

    async def close(self, grace_s: float = 2.0) -> None:
        """Waits up to `grace_s` for commits and releases that are under way, then cancels the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class LoadWithPending:
    """The load of the scheduler (see `admission.Load`) plus the outputs whose runners still try to get the lease."""

    def __init__(self, leased_runners: LeasedRunners) -> None:
        self._scheduler = leased_runners.engine.scheduler
        self._asking = leased_runners.asking

    @property
    def num_outputs(self) -> int:
        """See `Load`."""
        return self._scheduler.num_outputs + len(self._asking)

    def num_outputs_of(self, priority: Priority) -> int:
        """See `Load`."""
        return self._scheduler.num_outputs_of(priority) + sum(job.priority is priority for job in self._asking.values())

    @property
    def num_free(self) -> int:
        """See `Load`."""
        return max(0, self._scheduler.num_free - len(self._asking))

    def num_waiting(self, priority: Priority | None = None) -> int:
        """See `Load`. Outputs for which slots are free do not wait."""
        waiting = Counter(job.priority for job in self._asking.values())
        ours = len(self._asking) if priority is None else waiting[priority]
        return self._scheduler.num_waiting(priority) + max(0, ours - self._scheduler.num_free)

    def num_waiting_of(self, caller: str, priority: Priority | None = None) -> int:
        """See `Load`."""
        jobs = self._asking.values()
        ours = sum(job.caller == caller and priority in (None, job.priority) for job in jobs)
        return self._scheduler.num_waiting_of(caller, priority) + max(0, ours - self._scheduler.num_free)

    def num_waiting_of_tenant(self, tenant: str, priority: Priority) -> int:
        """See `Load`."""
        jobs = self._asking.values()
        ours = sum(job.caller.partition("/")[0] == tenant and job.priority is priority for job in jobs)
        return self._scheduler.num_waiting_of_tenant(tenant, priority) + max(0, ours - self._scheduler.num_free)

    def num_ended_of(self, priority: Priority) -> int:
        """See `Load`."""
        return self._scheduler.num_ended_of(priority)

    def num_callers_waiting(self, priority: Priority, tenant: str | None = None) -> int:
        """See `Load`."""
        return self._scheduler.num_callers_waiting(priority, tenant)

    def backlog_s(self) -> float:
        """See `Load`."""
        return self._scheduler.backlog_s()

    def estimate_s(self, output: ScheduledOutput, num_outputs: int = 1) -> float:
        """See `Load`."""
        return self._scheduler.estimate_s(output, num_outputs + len(self._asking))
