"""Runs one execution: here under a lease, followed from another replica, or taken over from one that died.

    submit ──► tries the lease ─────► leads: the engine runs it, from the newest checkpoint
                     ▲    └─────────► follows: steps and frames come from the leader's stream
                     └── leader lost ────┘└──► committed: the picture comes from the shared tiers

An execution uses a leased runner as it would use the engine; generations see no
difference. A leader publishes its steps only after another replica has announced
that it follows: an execution without followers costs only a lease, its renewals and
a commit. Invariants: the picture is in a shared tier before it is committed with its
bill; a result is billed once; while Redis cannot be reached everything runs here and
is committed later or never.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import structlog

from safelight_server.catalog.pixels import NotFiniteError
from safelight_server.cluster.bills import BilledWork
from safelight_server.cluster.commit import KeepPicture, commit_result, committed_picture
from safelight_server.cluster.leased_runners import FOLLOW, ExecutionTicket, LeasedRunners
from safelight_server.coordination.base import BEGINNING, LeaderLostError
from safelight_server.coordination.leadership import Leadership
from safelight_server.domain.component import Component
from safelight_server.domain.errors import InternalError, SafelightError
from safelight_server.domain.picture import Pixels
from safelight_server.domain.tensors import Embedding, FloatArray
from safelight_server.engine.jobs import Job
from safelight_server.engine.latents import Snapshot
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.storage.base import StoreError
from safelight_server.storage.sealed import CorruptError, Entry, UnreadableError
from safelight_server.telemetry import Trail

log = structlog.get_logger(__name__)

EVENT_S = 3600.0
"""How long the sealed event of a step can be opened."""


class LeasedRunner(ExecutionObserver):
    """Runs or follows one execution.

    Args:
        keep: stores the picture where the ticket points.
    """

    def __init__(self, leased_runners: LeasedRunners, ticket: ExecutionTicket, keep: KeepPicture) -> None:
        self.ticket = ticket
        self.followed = False
        self._leased_runners = leased_runners
        self._keep = keep
        self._job: Job | None = None
        self._listener: ExecutionObserver | None = None
        self._task: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._leader: Leadership | None = None
        self._submitted = False
        self._committing = False
        self._may_have_progress = ticket.again
        self._place = BEGINNING
        self._step = 0
        self._work = BilledWork()
        self._batch_size = 1
        self._unpublished: bytes | None = None
        self._publishing: asyncio.Task[None] | None = None

    # --- called by the execution: the same methods as those of the engine ---

    def submit(self, job: Job, listener: ExecutionObserver) -> None:
        """Starts the job. All reports go to the observer."""
        self._job, self._listener = job, listener
        if not self._committing:
            self._task = self._leased_runners.start(self._run(job, listener))

    def suspend(self, output_id: int) -> Snapshot | None:
        """Stops the job. Checkpoints stay for this replica and for others."""
        snapshot = self._job.start if self._job else None
        if self._committing:
            return snapshot
        if self._task is not None:
            self._task.cancel()
        if self._submitted:
            snapshot = self._leased_runners.engine.suspend(output_id) or snapshot
            if not self._committing:
                self._submitted = False
                self._leaving = self._leased_runners.start(self._leave(snapshot))
        return snapshot

    def reschedule(self, output_id: int, priority: int, deadline: float | None) -> None:
        """Changes class and deadline in the engine, if the job runs here."""
        assert self._job is not None
        self._job = replace(self._job, priority=type(self._job.priority)(priority), deadline=deadline)
        if self._submitted:
            self._leased_runners.engine.reschedule(output_id, self._job.priority, deadline)

    async def preview(self, job: Job, denoised: FloatArray, component: Component) -> FloatArray | None:
        """Decodes a preview here, also when the steps are made on another replica."""
        return await self._leased_runners.engine.preview(job, denoised, component)

    def load(self) -> float:
        """The load of the engine; see `Engine.load`."""
        return self._leased_runners.engine.load()

    # --- which replica computes ---

    async def _run(self, job: Job, listener: ExecutionObserver) -> None:
        self._leased_runners.asking[self] = job
        try:
            await self._lead_or_follow(job, listener)
        except Exception:
            log.exception("bug", generation=self.ticket.generation)
            self.failed(InternalError())
        finally:
            self._leased_runners.asking.pop(self, None)

    async def _lead_or_follow(self, job: Job, listener: ExecutionObserver) -> None:
        if self._leaving is not None:
            await asyncio.wait({self._leaving})
        while True:
            try:
                leader = await self._take()
                if leader is not None:
                    await self._lead(job, listener, leader)
                    return
                pixels = await committed_picture(self._leased_runners, self.ticket.name)
                if pixels is not None:
                    listener.found(pixels)
                    return
                self._leased_runners.asking.pop(self, None)
                if await self._follow(job, listener):
                    await self._lead(job, listener, None)
                    return
            except StoreError:
                await self._lead(job, listener, None)
                return
            except LeaderLostError:
                self._may_have_progress = True

    async def _take(self) -> Leadership | None:
        taking = asyncio.create_task(
            Leadership.take(self._leased_runners.coordinator, self.ticket.name, self._leased_runners.ttl_s)
        )
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._leaving = self._leased_runners.start(_give_back(taking))
            raise

    async def _follow(self, job: Job, listener: ExecutionObserver) -> bool:
        """Follows the leader until its result is committed (False), or until Redis cannot be reached (True).

        Raises:
            LeaderLostError: the leader has died.
        """
        self._leased_runners.bulletin.publish(FOLLOW, self.ticket.name)
        self._leased_runners.engine.follow(job.output_id)
        reading = asyncio.create_task(self._read_steps(listener))
        away = asyncio.create_task(self._leased_runners.away.wait())
        try:
            await asyncio.wait({reading, away}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return True
            reading.result()
            return False
        finally:
            self._leased_runners.engine.unfollow(job.output_id)
            for task in (reading, away):
                task.cancel()
            await asyncio.wait({reading, away})

    async def _read_steps(self, listener: ExecutionObserver) -> None:
        async with contextlib.aclosing(
            self._leased_runners.coordinator.follow(self.ticket.name, self._place)  # type: ignore[type-var]  # is a generator
        ) as events:
            async for event in events:
                self._place = event.place
                try:
                    entry, _ = self._leased_runners.sealer.open(self.ticket.name, event.data)
                    step, batch_size = int(entry.metadata["step"]), int(entry.metadata["batch"])
                except (CorruptError, UnreadableError, KeyError, ValueError):
                    continue
                if step > self._step:
                    self._step = step
                    listener.heard(step, batch_size, self._latent(entry.data))

    def _latent(self, data: bytes) -> FloatArray | None:
        assert self._job is not None
        shape = self._job.latent_shape
        return np.frombuffer(data, np.float32).reshape(shape) if len(data) == 4 * math.prod(shape) else None

    async def _lead(self, job: Job, listener: ExecutionObserver, leader: Leadership | None) -> None:
        """Runs the job here. Without a lease it runs for this replica's own watchers only, until Redis is back."""
        self._leader = leader
        try:
            if self._may_have_progress and leader is not None:
                kept = await self._leased_runners.pictures.at(self.ticket.pointer)
                if kept is not None:  # the last leader died between storing the picture and its commit
                    pixels, facts = kept
                    steps = facts.num_steps
                    rows = steps * len(job.token_ids)
                    rows -= job.num_rows_skipped(range(job.table.num_steps - steps, job.table.num_steps))
                    self._work = BilledWork(rows, steps, facts.compute_s)
                    self._committing = True
                    await self._commit(pixels, listener)
                    return
            start = await self._newest(job.start)
        except asyncio.CancelledError:
            if leader is not None and not self._committing:
                self._leaving = self._leased_runners.start(leader.close())
            raise
        assert self._job is not None
        self._step = replace(self._job, start=start).first_step
        self._submitted = True
        self._leased_runners.leads(self)
        self._leased_runners.engine.submit(replace(self._job, start=start), self)

    async def _newest(self, start: Snapshot | None) -> Snapshot | None:
        if self.ticket.checkpoints is None:
            return start
        kept = await self._leased_runners.checkpoints.newest(*self.ticket.checkpoints)
        return kept if kept is not None and (start is None or kept.step > start.step) else start

    async def _leave(self, snapshot: Snapshot | None) -> None:
        """Releases the lease, so that another replica can continue."""
        self._leased_runners.ends(self)
        leader, self._leader, job = self._leader, None, self._job
        if leader is None or job is None:
            return
        if snapshot is not None and self.ticket.checkpoints is not None:
            await self._leased_runners.checkpoints.keep(
                *self.ticket.checkpoints,
                snapshot,
                job.table.num_steps,
                revision=self.ticket.revision,
                generation=self.ticket.generation,
                replicate=True,
            )
        await leader.close()

    # --- called by the engine while the job runs here ---

    def trails(self) -> Sequence[Trail]:
        """The traces of the execution."""
        return self._observer().trails()

    def started(self) -> None:
        """Forwards to the execution."""
        self._observer().started()

    def computed(self, seconds: float, rows: int) -> None:
        """Forwards to the execution, and adds to the bill."""
        self._work.compute_s += seconds
        self._work.rows += rows
        self._observer().computed(seconds, rows)

    def stepped(self, step: int, batch_size: int) -> None:
        """Forwards to the execution, and publishes the step with its frame to followers."""
        self._step = step
        self._work.steps += 1
        self._batch_size = batch_size
        self._observer().stepped(step, batch_size)

    @property
    def next_due(self) -> float:
        """The next step whose frame is needed: every step while a replica follows, otherwise that of the execution."""
        return 0 if self.followed else self._observer().next_due

    def frame(self, step: int, denoised: FloatArray) -> None:
        """Hands a frame to the execution and to followers."""
        if step >= self._observer().next_due:
            self._observer().frame(step, denoised)
        if self.followed and self._leader is not None:
            facts = {"step": str(step), "batch": str(self._batch_size)}
            entry = Entry(np.ascontiguousarray(denoised, np.float32).tobytes(), facts)
            sealer = self._leased_runners.sealer
            self._unpublished = sealer.seal(self.ticket.name, entry, sealer.now() + EVENT_S)
            if self._publishing is None or self._publishing.done():
                self._publishing = self._leased_runners.start(self._publish(self._leader))

    async def _publish(self, leader: Leadership) -> None:
        while (data := self._unpublished) is not None:  # if Redis is slower than the steps, older frames are dropped
            self._unpublished = None
            await leader.publish(data)

    def wants_checkpoint(self, step: int) -> bool:
        """Forwards to the execution."""
        return self._observer().wants_checkpoint(step)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Forwards to the execution."""
        self._observer().checkpoint(snapshot)

    def encoded(self, row: int, embedding: Embedding) -> None:
        """Forwards to the execution."""
        self._observer().encoded(row, embedding)

    def decoded(self, image: FloatArray) -> None:
        """Stores and commits the picture, then hands it to the execution."""
        self._committing, self._submitted = True, False
        self._leased_runners.start(self._decoded(image, self._observer()))

    async def _decoded(self, image: FloatArray, listener: ExecutionObserver) -> None:
        job = self._job
        assert job is not None
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(self._leased_runners.pool, job.finish, image)
        except NotFiniteError:
            log.error("image_not_finite", generation=self.ticket.generation)
            self._committing = False
            self.failed(InternalError())
        except Exception:
            log.exception("bug", generation=self.ticket.generation)
            self._committing = False
            self.failed(InternalError())
        else:
            await self._commit(pixels, listener)

    def failed(self, error: SafelightError) -> None:
        """Forwards to the execution. Followers then try the job themselves."""
        self._submitted = False
        self._leaving = self._leased_runners.start(self._leave(None))
        self._observer().failed(error)

    def expired(self) -> None:
        """Forwards to the execution."""
        self._submitted = False
        self._leaving = self._leased_runners.start(self._leave(None))
        self._observer().expired()

    def _observer(self) -> ExecutionObserver:
        assert self._listener is not None
        return self._listener

    async def _commit(self, pixels: Pixels, listener: ExecutionObserver) -> None:
        leader, self._leader = self._leader, None
        try:
            listener.found(
                await commit_result(self._leased_runners, self.ticket, self._keep, pixels, self._work, leader)
            )
        finally:
            self._leased_runners.ends(self)


async def _give_back(taking: asyncio.Task[Leadership | None]) -> None:
    """Releases a lease that was acquired after its runner had been stopped."""
    with contextlib.suppress(StoreError):
        if (leader := await taking) is not None:
            await leader.close()
