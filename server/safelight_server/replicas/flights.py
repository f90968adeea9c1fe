"""One execution, wherever it runs: led here, followed from another replica, or taken over from one that died.

    submit ──► asks for the lease ──► leads: the engine runs it, from the newest checkpoint
                     ▲    └─────────► follows: steps and frames come from the leader's stream
                     └── leader lost ────┘└──► committed: the picture comes from the shared tiers

To `execution.py` a flight is what the engine is; generations do not see the
difference. A leader publishes its steps once someone has said that he follows:
what nobody follows costs a lease, its renewals and a commit. Invariants: the
picture lies in a shared tier before it is committed with its bill; a result is
billed once; without Redis everything runs here and commits later or never.
Neighbours: `engine`, `cache.coordination`, `cache.checkpoints`, `news`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import structlog
from safelight_server.cache.checkpoints import Checkpoints
from safelight_server.cache.coordination.base import BEGINNING, Coordinator, LeaderLostError, Outcome
from safelight_server.cache.coordination.leadership import Leadership
from safelight_server.cache.pictures import Pictures
from safelight_server.cache.store.base import StoreError
from safelight_server.cache.store.sealed import CorruptError, Entry, Sealer, UnreadableError
from safelight_server.engine import Engine, Job, OutputListener
from safelight_server.errors import InternalError, SafelightError
from safelight_server.latents import Snapshot
from safelight_server.picture import Pixels
from safelight_server.pipeline import to_pixels
from safelight_server.replicas.news import News
from safelight_server.runtime.base import Component, FloatArray

log = structlog.get_logger(__name__)

FOLLOW = "follow"
EVENT_S = 3600.0
LAND_S = 1.0
"""How long a finished picture waits for its commit before its own watchers get it all the same."""
GIVE_UP_S = 120.0
"""How long a result is kept for a Redis that is away; then it is discarded, unbilled."""
MAX_LATE = 256
"""Results kept for that."""
RETRY_S = 0.5
MAX_WISHES = 4096


class FlightListener(OutputListener, Protocol):
    """Also hears of what happens elsewhere."""

    def heard(self, step: int, batch_size: int, denoised: FloatArray | None) -> None:
        """`step` steps are made by another replica."""

    def found(self, pixels: Pixels) -> None:
        """The finished picture. The output has ended."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a flight is known by.

    Attributes:
        name: to all replicas; an HMAC.
        pointer: the key of its pixels in the tiers.
        checkpoints: tenant and execution of its checkpoints; None: it has none.
        tenant, generation: who is billed.
        again: it may have come far already, on a replica that is gone.
    """

    name: str
    pointer: str
    checkpoints: tuple[str, str] | None
    tenant: str
    generation: str
    again: bool = False


Keep = Callable[[Pixels, float], Awaitable[bool]]
"""Puts pixels where the ticket points, with the compute they took; whether a shared tier has them."""


class Flights:
    """All flights of this replica; run `watch_service` as a task.

    Args:
        ttl_s: of a lease.
        pool: threads for pixels.
    """

    def __init__(
        self,
        engine: Engine,
        coordinator: Coordinator,
        sealer: Sealer,
        checkpoints: Checkpoints,
        pictures: Pictures,
        news: News,
        pool: Executor,
        ttl_s: float,
    ) -> None:
        self.engine = engine
        self.coordinator = coordinator
        self.sealer = sealer
        self.checkpoints = checkpoints
        self.pictures = pictures
        self.news = news
        self.pool = pool
        self.ttl_s = ttl_s
        self.away = asyncio.Event()
        self.num_late = 0
        self._wishes: OrderedDict[str, None] = OrderedDict()
        self._leading: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        news.on(FOLLOW, lambda name, _facts: self._wish(name))

    def open(self, ticket: Ticket, keep: Keep) -> Flight:
        """A flight for one execution."""
        return Flight(self, ticket, keep)

    def start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Runs something of a flight; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("bug", exc_info=fault)

    def leads(self, flight: Flight) -> None:
        """It is led here from now on."""
        self._leading[flight.ticket.name] = flight
        if self._wishes.pop(flight.ticket.name, 0) is None:
            flight.followed = True

    def ends(self, flight: Flight) -> None:
        """It is not led here any more."""
        if self._leading.get(flight.ticket.name) is flight:
            del self._leading[flight.ticket.name]

    def _wish(self, name: str) -> None:
        if (flight := self._leading.get(name)) is not None:
            flight.followed = True
            return
        self._wishes[name] = None
        if len(self._wishes) > MAX_WISHES:
            self._wishes.popitem(last=False)

    async def watch_service(self) -> None:
        """Says in `away` when the service was away for longer than a lease: leaders elsewhere are out of reach."""
        since: float | None = None
        while True:
            try:
                await self.coordinator.holder("service")
                since = None
                self.away.clear()
            except StoreError:
                since = since or time.monotonic()
                if time.monotonic() - since >= self.ttl_s:
                    self.away.set()
            await asyncio.sleep(self.ttl_s / 3)

    async def close(self, grace_s: float = 2.0) -> None:
        """Waits for commits under way and gives leases back, as far as that is quick."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class Flight:
    """One execution; see the module. Made by `Flights.open`."""

    def __init__(self, flights: Flights, ticket: Ticket, keep: Keep) -> None:
        self.ticket = ticket
        self.followed = False
        self._flights = flights
        self._keep = keep
        self._job: Job | None = None
        self._listener: FlightListener | None = None
        self._task: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._leader: Leadership | None = None
        self._aloft = False
        self._landing = False
        self._again = ticket.again
        self._place = BEGINNING
        self._step = 0
        self._wanted = False
        self._bill = {"rows": 0.0, "steps": 0.0, "compute_s": 0.0}
        self._batch_size = 1
        self._unpublished: bytes | None = None
        self._publishing: asyncio.Task[None] | None = None

    # --- what the execution asks: as of the engine ---

    def submit(self, job: Job, listener: FlightListener) -> None:
        """Takes the job; whatever comes of it the listener hears."""
        self._job, self._listener = job, listener
        if not self._landing:
            self._task = self._flights.start(self._fly(job, listener))

    def suspend(self, output_id: int) -> Snapshot | None:
        """Stops; what was done here is kept, for this replica and the others."""
        snapshot = self._job.start if self._job else None
        if self._landing:
            return snapshot
        if self._task is not None:
            self._task.cancel()
        if self._aloft:
            snapshot = self._flights.engine.suspend(output_id) or snapshot
            if not self._landing:
                self._aloft = False
                self._leaving = self._flights.start(self._leave(snapshot))
        return snapshot

    def reschedule(self, output_id: int, priority: int, deadline: float | None) -> None:
        """As the engine, where it runs here."""
        assert self._job is not None
        self._job = replace(self._job, priority=type(self._job.priority)(priority), deadline=deadline)
        if self._aloft:
            self._flights.engine.reschedule(output_id, self._job.priority, deadline)

    async def preview(self, output_id: int, denoised: FloatArray, component: Component) -> FloatArray | None:
        """As the engine, where it runs here; else there is no decoder for it."""
        return await self._flights.engine.preview(output_id, denoised, component) if self._aloft else None

    def load(self) -> float:
        """As the engine; infinite where it runs elsewhere."""
        return self._flights.engine.load() if self._aloft else math.inf

    # --- who computes ---

    async def _fly(self, job: Job, listener: FlightListener) -> None:
        if self._leaving is not None:
            await asyncio.wait({self._leaving})
        while True:
            try:
                leader = await self._take()
                if leader is not None:
                    await self._lead(job, listener, leader)
                    return
                pixels = await self._committed()
                if pixels is not None:
                    listener.found(pixels)
                    return
                if await self._follow(listener):
                    await self._lead(job, listener, None)
                    return
            except StoreError:
                await self._lead(job, listener, None)
                return
            except LeaderLostError:
                self._again = True

    async def _take(self) -> Leadership | None:
        taking = asyncio.create_task(Leadership.take(self._flights.coordinator, self.ticket.name, self._flights.ttl_s))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._leaving = self._flights.start(_give_back(taking))
            raise

    async def _committed(self) -> Pixels | None:
        """The picture of a committed result; a result whose picture is gone is forgotten, to be computed anew."""
        coordinator, name = self._flights.coordinator, self.ticket.name
        result = await coordinator.result(name)
        if result is None:
            return None
        kept = await self._flights.pictures.at(result.pointer)
        if kept is None:
            await coordinator.forget(name, result)
            return None
        return kept[0]

    async def _follow(self, listener: FlightListener) -> bool:
        """Hears the leader until its result is committed; True: the service is away, and the leader with it.

        Raises:
            LeaderLostError: it died.
        """
        self._flights.news.say(FOLLOW, self.ticket.name)
        hearing = asyncio.create_task(self._hear(listener))
        away = asyncio.create_task(self._flights.away.wait())
        try:
            await asyncio.wait({hearing, away}, return_when=asyncio.FIRST_COMPLETED)
            if not hearing.done():
                return True
            hearing.result()
            return False
        finally:
            for task in (hearing, away):
                task.cancel()
            await asyncio.wait({hearing, away})

    async def _hear(self, listener: FlightListener) -> None:
        async with contextlib.aclosing(
            self._flights.coordinator.follow(self.ticket.name, self._place)  # type: ignore[type-var]  # is a generator
        ) as events:
            async for event in events:
                self._place = event.place
                try:
                    entry, _ = self._flights.sealer.open(self.ticket.name, event.data)
                except (CorruptError, UnreadableError):
                    continue
                step = int(entry.metadata["step"])
                if step > self._step:
                    self._step = step
                    listener.heard(step, int(entry.metadata["batch"]), self._latent(entry.data))

    def _latent(self, data: bytes) -> FloatArray | None:
        assert self._job is not None
        shape = self._job.latent_shape
        return np.frombuffer(data, np.float32).reshape(shape) if len(data) == 4 * math.prod(shape) else None

    async def _lead(self, job: Job, listener: FlightListener, leader: Leadership | None) -> None:
        """Runs it here; without a leadership for the own watchers only, until the service is back."""
        self._leader = leader
        try:
            if self._again and leader is not None:
                kept = await self._flights.pictures.at(self.ticket.pointer)
                if kept is not None:  # its leader died between picture and commit
                    pixels, facts = kept
                    self._bill = {
                        "rows": float(facts.num_steps * len(job.token_ids)),
                        "steps": float(facts.num_steps),
                        "compute_s": facts.compute_s,
                    }
                    self._landing = True
                    await self._land(pixels, listener)
                    return
            start = await self._newest(job.start)
        except asyncio.CancelledError:
            if leader is not None and not self._landing:
                self._leaving = self._flights.start(leader.close())
            raise
        assert self._job is not None
        self._step = start.step if start else 0
        self._aloft = True
        self._flights.leads(self)
        self._flights.engine.submit(replace(self._job, start=start), self)

    async def _newest(self, start: Snapshot | None) -> Snapshot | None:
        if self.ticket.checkpoints is None:
            return start
        kept = await self._flights.checkpoints.newest(*self.ticket.checkpoints)
        return kept if kept is not None and (start is None or kept.step > start.step) else start

    async def _leave(self, snapshot: Snapshot | None) -> None:
        """Lets others go on from here."""
        self._flights.ends(self)
        leader, self._leader, job = self._leader, None, self._job
        if leader is None or job is None:
            return
        if snapshot is not None and self.ticket.checkpoints is not None:
            await self._flights.checkpoints.keep(
                *self.ticket.checkpoints,
                snapshot,
                job.table.num_steps,
                generation=self.ticket.generation,
                replicate=True,
            )
        await leader.close()

    # --- what the engine reports while it runs here ---

    def started(self) -> None:
        """To the execution."""
        self._told().started()

    def computed(self, seconds: float, rows: int) -> None:
        """To the execution, and to the bill."""
        self._bill["compute_s"] += seconds
        self._bill["rows"] += rows
        self._told().computed(seconds, rows)

    def stepped(self, step: int, batch_size: int) -> None:
        """To the execution; those who follow get it with its frame."""
        self._step = step
        self._bill["steps"] += 1
        self._batch_size = batch_size
        self._told().stepped(step, batch_size)

    def wants_frame(self, step: int) -> bool:
        """Whether the execution wants it, or someone follows."""
        self._wanted = self._told().wants_frame(step)
        return self._wanted or self.followed

    def frame(self, step: int, denoised: FloatArray) -> None:
        """To whoever wants it."""
        if self._wanted:
            self._told().frame(step, denoised)
        if self.followed and self._leader is not None:
            facts = {"step": str(step), "batch": str(self._batch_size)}
            entry = Entry(np.ascontiguousarray(denoised, np.float32).tobytes(), facts)
            self._unpublished = self._flights.sealer.seal(self.ticket.name, entry, time.time() + EVENT_S)
            if self._publishing is None or self._publishing.done():
                self._publishing = self._flights.start(self._publish(self._leader))

    async def _publish(self, leader: Leadership) -> None:
        while (data := self._unpublished) is not None:  # the newest wins where Redis is slower than the steps
            self._unpublished = None
            await leader.publish(data)

    def wants_checkpoint(self, step: int) -> bool:
        """As the execution says."""
        return self._told().wants_checkpoint(step)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """To the execution."""
        self._told().checkpoint(snapshot)

    def encoded(self, row: int, embedding: FloatArray) -> None:
        """To the execution."""
        self._told().encoded(row, embedding)

    def decoded(self, image: FloatArray) -> None:
        """The picture is put where all see it and committed; then the execution has it."""
        self._landing, self._aloft = True, False
        self._flights.start(self._decoded(image, self._told()))

    async def _decoded(self, image: FloatArray, listener: FlightListener) -> None:
        pixels = await asyncio.get_running_loop().run_in_executor(self._flights.pool, to_pixels, image)
        await self._land(pixels, listener)

    def failed(self, error: SafelightError) -> None:
        """To the execution; those who follow try themselves."""
        self._aloft = False
        self._leaving = self._flights.start(self._leave(None))
        self._told().failed(error)

    def expired(self) -> None:
        """To the execution."""
        self._aloft = False
        self._leaving = self._flights.start(self._leave(None))
        self._told().expired()

    def _told(self) -> FlightListener:
        assert self._listener is not None
        return self._listener

    # --- the end ---

    async def _land(self, pixels: Pixels, listener: FlightListener) -> None:
        decided: asyncio.Future[Pixels | None] = asyncio.get_running_loop().create_future()
        committing = self._flights.start(self._commit(pixels, decided))
        try:
            async with asyncio.timeout(LAND_S):
                theirs = await asyncio.shield(decided)
        except TimeoutError:
            theirs = None
        if committing.done() and not committing.cancelled() and committing.exception() is not None:
            listener.failed(InternalError())
            return
        listener.found(pixels if theirs is None else theirs)

    async def _commit(self, pixels: Pixels, decided: asyncio.Future[Pixels | None]) -> None:
        """Commits; `decided` with the picture that counts in place of ours, or None as soon as this takes long."""
        flights, until = self._flights, time.monotonic() + GIVE_UP_S
        late = False
        try:
            while time.monotonic() < until:
                with contextlib.suppress(StoreError):
                    if await self._keep(pixels, self._bill["compute_s"]):
                        if self._leader is None:
                            self._leader = await self._take()
                        if self._leader is None:  # led or committed by another: theirs counts
                            _decide(decided, await self._committed())
                            return
                        outcome = await self._leader.commit(self.ticket.pointer, self._sealed_bill(), LAND_S)
                        if outcome is Outcome.TAKEN:
                            _decide(decided, await self._committed())
                        if outcome is not None:
                            return
                if not late:
                    late = flights.num_late < MAX_LATE
                    if not late:
                        return
                    flights.num_late += 1
                    _decide(decided, None)
                await asyncio.sleep(RETRY_S)
            log.warning("a result was not committed in time and is discarded", generation=self.ticket.generation)
        finally:
            flights.num_late -= late
            flights.ends(self)
            _decide(decided, None)
            if self._leader is not None:
                await self._leader.close()

    def _sealed_bill(self) -> bytes:
        facts = {"tenant": self.ticket.tenant, "generation": self.ticket.generation} | self._bill
        return self._flights.sealer.seal(BILL, Entry(json.dumps(facts).encode()), time.time() + BILL_S)


BILL = "bill"
BILL_S = 400 * 86_400.0
"""How long bills can be opened."""


def _decide(decided: asyncio.Future[Pixels | None], pixels: Pixels | None) -> None:
    if not decided.done():
        decided.set_result(pixels)


async def _give_back(taking: asyncio.Task[Leadership | None]) -> None:
    """Gives back a lease that came too late."""
    with contextlib.suppress(StoreError):
        if (leader := await taking) is not None:
            await leader.close()
