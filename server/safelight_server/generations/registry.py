"""The registry of all generations that this server knows: starts, finds, watches, suspends, ends and drains them.

One generation is started per request id. When the last stream of a generation is
lost, the generation is suspended until its grace is over, unless it is detached.
Ended generations are kept for a while. Invariants: a generation of another tenant
is NOT_FOUND; finished pictures are bounded in time and bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Mapping

import structlog

from safelight_server.cache.cache import Cache
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.cluster.leased_runners import LeasedRunners
from safelight_server.cluster.records import GenerationRecord
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import (
    FailedPreconditionError,
    GenerationCancelledError,
    NotFoundError,
    QueueFullError,
    SafelightError,
    UnavailableError,
)
from safelight_server.domain.events import Durability, FinishReason, GenerationState
from safelight_server.domain.request import PreviewPolicy, Request
from safelight_server.engine.engine import Engine
from safelight_server.generations import outcomes
from safelight_server.generations.admission import BATCH_ROOM, AdmissionLimits
from safelight_server.generations.degradation import degrade
from safelight_server.generations.execution import Executions
from safelight_server.generations.factory import GenerationFactory
from safelight_server.generations.finished import FinishedGenerations
from safelight_server.generations.generation import Generation
from safelight_server.generations.idempotency import Idempotency
from safelight_server.generations.init_images import InitImages
from safelight_server.generations.inspection import Inspection
from safelight_server.generations.open_streams import End, OpenStreams
from safelight_server.generations.ownership import CANCEL, PRIORITY, ClusterContext, Ownership
from safelight_server.generations.planner import Planner
from safelight_server.generations.pressure import Pressure
from safelight_server.generations.queue_positions import publish_queue_positions
from safelight_server.generations.suspended import SuspendedGenerations
from safelight_server.generations.unread_bytes import UnreadBytes
from safelight_server.prices import ComputePrice
from safelight_server.runtime.base import Runtime
from safelight_server.scheduler import Priority
from safelight_server.settings import Settings
from safelight_server.stream import Watcher
from safelight_server.telemetry import Metrics, Stage

log = structlog.get_logger(__name__)

TICK_S = 0.25
TICKS_PER_PRESSURE = 4
"""Pressure is updated every so many ticks: each update visits all outputs, and queues change over seconds."""


class Generations:
    """All generations of this server, by id.

    Args:
        clock: monotonic seconds.
        charge: called with each amount of compute: the tenant's name, the model and seconds.
        price: the price of compute; None: nothing has a cost.
        leased_runners: run jobs under leases that replicas share; None: there is only this replica.
        context: what the replicas share; None: there is only this replica.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        runtime: Runtime,
        engine: Engine,
        cache: Cache,
        executions: Executions,
        clock: Callable[[], float],
        metrics: Metrics,
        images: InitImages,
        leased_runners: LeasedRunners | None = None,
        context: ClusterContext | None = None,
        charge: Callable[[str, str, float], None] = lambda _tenant, _model, _seconds: None,
        price: ComputePrice | None = None,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._engine = engine
        self._clock = clock
        self._now = time.time if context is None else context.sealer.now
        self._metrics = metrics
        self._images = images
        most = settings.max_waiting_outputs
        waiting = dict.fromkeys(Priority, most) | {Priority.BATCH: BATCH_ROOM * most}
        limits = AdmissionLimits(waiting, settings.max_waiting_per_caller)
        wait_s = {Priority[name.upper()]: seconds for name, seconds in settings.class_wait_s.items()}
        self._pressure = Pressure(wait_s, functools.partial(outcomes.count_pressure, metrics))
        self._planner = Planner(
            catalog, runtime, engine, executions, cache, limits, images, metrics.requested, leased_runners
        )
        self._ownership = None if context is None else Ownership(context, self, self._planner)
        if self._ownership is not None:
            self._ownership.bulletin.subscribe(CANCEL, self._asked_to_cancel)
            self._ownership.bulletin.subscribe(PRIORITY, self._asked_for_priority)
        self._starting: dict[str, asyncio.Event] = {}
        self._live: dict[str, Generation] = {}
        self._finished = FinishedGenerations(
            settings.result_ttl_s, settings.max_results, settings.max_results_bytes, clock
        )
        self._suspended = SuspendedGenerations(settings.max_lost)
        self._requests = Idempotency(settings.idempotency_ttl_s, clock)
        self._factory = GenerationFactory(
            settings, clock, self._now, engine.outage.late, on_end=self._ended, charge=charge, price=price
        )
        self._draining = False
        self._generation_ended = asyncio.Event()
        self._streams = OpenStreams()
        self._unread = UnreadBytes(settings.max_unread_bytes, self._streams, self._suspended, self._end_stalled)

    def inspect(self) -> Inspection:
        """Counts what is held now."""
        scheduler = self._engine.scheduler
        return Inspection(
            starting=len(self._starting),
            live=len(self._live),
            suspended=len(self._suspended),
            finished=len(self._finished),
            streams=len(self._streams),
            outputs=scheduler.num_outputs,
            waiting=scheduler.num_waiting(),
            running=scheduler.num_running,
            parked=scheduler.num_parked,
            latents=self._engine.num_latents,
            executions=self._planner.num_executions,
            keeping=self._planner.num_keeping,
        )

    # --- starting ---

    def knows(self, caller: Caller, request_id: str) -> bool:
        """Whether this replica has a generation of a request id, so that the same request would start none."""
        return bool(request_id) and self._requests.knows(caller, request_id)

    async def start(self, caller: Caller, request: Request, stage: Stage, time_left_s: float | None) -> Generation:
        """The generation of a request: a new one, or the one that its request id stands for.

        Raises:
            UnavailableError, AlreadyExistsError, FailedPreconditionError, QueueFullError, DeadlineUnreachableError,
            InvalidRequestError, NotFoundError: the request is refused.
        """
        while request.request_id:
            known = self._requests.find(caller, request.request_id, request.body_digest)
            if known is None:
                break
            if (started := self._starting.get(known)) is None:
                return await self._known(caller, known, request)
            await started.wait()  # then look again: the other request may have been refused
        self._refuse_while_draining()
        self._unread.check(caller)
        generation = self._factory.make(secrets.token_hex(16), caller, request, stage, time_left_s)
        if request.request_id:
            self._requests.remember(caller, request.request_id, request.body_digest, generation.identifier)
        started = self._starting[generation.identifier] = asyncio.Event()
        try:
            other = await self._start(generation)
            if other is not None:
                self._requests.release(caller, request.request_id)
        except BaseException:  # whatever the error is, a retry must find nothing of this request
            self._live.pop(generation.identifier, None)
            self._requests.release(caller, request.request_id)
            if self._ownership is not None:
                await self._ownership.owners.dismiss(generation)
            raise
        finally:
            del self._starting[generation.identifier]
            started.set()
        return generation if other is None else await self._known_elsewhere(caller, other, request)

    async def _start(self, generation: Generation) -> str | None:
        """Starts a generation. Returns the id of another replica's generation if that has the request id."""
        request = generation.request
        if self._ownership is not None and (other := await self._ownership.owners.enroll(generation)) is not None:
            return other
        branched_from = None
        if request.branch is not None:
            try:
                branched_from = await self.find(generation.caller, request.branch.generation_id, tend=False)
            except NotFoundError as error:
                raise outcomes.in_field(error, "branch.generation") from None
        with generation.stage.within("lookup"):
            await self._images.keep_outputs(generation, functools.partial(self.find, tend=False))
            plans = await self._planner.plan(generation, branched_from)
            if self._pressure.on(request.priority):
                plans = await degrade(self._planner, generation, plans)
        self._refuse_while_draining()
        if self._ownership is not None:
            await self._ownership.owners.record(generation, plans)
            self._refuse_while_draining()
        self._live[generation.identifier] = generation
        with generation.stage.within("admission"):
            self._planner.submit(generation, plans, generation.left_s)
        outcomes.count_degradations(generation, self._metrics)
        return None

    def under_pressure(self, priority: Priority) -> bool:
        """Whether requests of a class are degraded now, as far as their quality floors allow."""
        return self._pressure.on(priority)

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise UnavailableError("the server is draining; ask another", reason="DRAINING", retry_after_s=1.0)

    async def _known(self, caller: Caller, identifier: str, request: Request) -> Generation:
        try:
            return await self.find(caller, identifier)
        except NotFoundError:
            raise outcomes.expired(identifier, request) from None

    async def _known_elsewhere(self, caller: Caller, identifier: str, request: Request) -> Generation:
        try:
            return await self._known(caller, identifier, request)
        except FailedPreconditionError:
            if self._ownership is None or await self._ownership.owners.has_record(identifier):
                raise
            # it was refused after its record had been read here, and nothing is left of it
            raise UnavailableError("another replica has just refused it; try again", retry_after_s=0.1) from None

    # --- finding ---

    async def find(self, caller: Caller, identifier: str, *, tend: bool = True) -> Generation:
        """A generation of the caller's tenant, on whatever replica.

        Args:
            tend: whether the caller is going to watch it; otherwise a snapshot of its state is enough.

        Raises:
            NotFoundError: there is no such generation, or it belongs to another tenant.
            UnavailableError: generations of other replicas cannot be looked up now.
        """
        generation = self._live.get(identifier) or self._finished.get(identifier)
        if generation is None and self._ownership is not None:
            generation = await self._ownership.mirrors.find(identifier, tend=tend)
            generation = self._live.get(identifier, generation)  # this replica may own it by now
            if generation is not None and self._is_old(generation):
                generation = None
        if generation is None or generation.caller.tenant != caller.tenant:
            if generation is not None:
                self._drop_unwatched(generation)
            raise NotFoundError(f"there is no generations/{identifier}", reason="GENERATION_NOT_FOUND")
        return generation

    def _is_old(self, generation: Generation) -> bool:
        ended = generation.finish_time
        return ended is not None and self._now() - ended.timestamp() > self._settings.result_ttl_s

    async def cancel(self, generation: Generation) -> None:
        """Stops a generation, on whatever replica it runs.

        Raises:
            UnavailableError: the replica that owns it does not answer.
        """
        if not generation.owned and not generation.ended and self._ownership is not None:
            await self._ownership.mirrors.ask(generation, CANCEL)
        if generation.owned:
            await generation.until_decidable(lambda: generation.identifier in self._live)
            generation.stop(GenerationCancelledError("it was cancelled"))

    def set_priority(self, generation: Generation, priority: Priority) -> None:
        """Changes the priority of a generation, on whatever replica it runs."""
        generation.set_priority(priority)
        if not generation.owned and self._ownership is not None:
            self._ownership.mirrors.tell(generation, PRIORITY, priority=str(int(priority)))

    def pipeline_of(self, generation: Generation) -> Pipeline:
        """The pipeline of a generation.

        Raises:
            UnavailableError: this replica has another pipeline of that name.
        """
        self._check(generation)
        return self._catalog.get(generation.request.spec.model)

    def _check(self, generation: Generation) -> None:
        if self._ownership is not None:
            self._ownership.mirrors.check(generation)

    # --- watching ---

    def attach(
        self,
        generation: Generation,
        policy: PreviewPolicy,
        end: End,
        after_sequence: int = 0,
        offsets: Mapping[int, int] | None = None,
    ) -> Watcher:
        """Opens a stream of a generation, and resumes the generation if it is suspended."""
        try:
            self._check(generation)
            if generation.ended or generation.log.watchers:  # the first stream of a running generation holds no bytes
                self._unread.check(generation.caller)
            watcher = generation.log.watch(generation.preview_policy(policy), after_sequence, offsets)
        except SafelightError:
            self._drop_unwatched(generation)
            raise
        self._streams.add(watcher, generation, end)
        self._finished.watched(generation)
        if not generation.owned:
            if self._ownership is not None and not generation.ended:
                self._ownership.mirrors.attend(generation)
        elif generation.state is GenerationState.SUSPENDED:
            self._suspended.resume(generation)
            if self._ownership is not None:
                self._ownership.mirrors.resume(generation)
        return watcher

    def detach(self, watcher: Watcher) -> SafelightError | None:
        """Removes a stream that has ended, for whatever reason, and suspends the generation if it was the last.

        Returns:
            The error of the generation; None: it has none.
        """
        if (generation := self._streams.close(watcher)) is None:
            return None
        self._stream_left(generation)
        return generation.error

    def _stream_left(self, generation: Generation) -> None:
        self._finished.unwatched(generation)
        if not generation.owned:
            self._drop_unwatched(generation)
            return
        disconnect = generation.request.disconnect
        if (
            generation.ended
            or generation.log.watchers
            or disconnect.detach
            or generation.state is GenerationState.SUSPENDED
        ):
            return
        self._suspend(generation)

    def _drop_unwatched(self, generation: Generation) -> None:
        if self._ownership is not None and not generation.owned and not generation.log.watchers:
            self._ownership.mirrors.drop(generation)

    def _suspend(self, generation: Generation) -> None:
        """Suspends a generation without streams, or hands it to a replica that has a stream for it."""
        left = generation.left_s
        if left is not None and left <= 0:
            return  # its timer ends it
        if self._draining:
            self._end_drained(generation)
            return
        if self._ownership is not None and self._ownership.owners.wants(generation):
            self._move(generation)
            return
        self._suspended.suspend(generation)

    # --- ending ---

    def _ended(self, generation: Generation) -> None:
        self._forget(generation)
        if generation.whole:
            self._finished.add(generation)
        if not generation.owned:
            return
        retryable = isinstance(generation.error, UnavailableError)  # gRPC retries UNAVAILABLE: the id must be free
        if self._ownership is not None:
            self._ownership.owners.settle(generation, retryable=retryable)
        if generation.request.request_id:
            settle = self._requests.release if retryable else self._requests.ended
            settle(generation.caller, generation.request.request_id)
        outcomes.count_outcome(generation, self._metrics)

    def _forget(self, generation: Generation) -> None:
        if self._live.get(generation.identifier) is generation:
            del self._live[generation.identifier]
        self._suspended.forget(generation)
        self._generation_ended.set()

    # --- for the ownership: as its GenerationHost ---

    def revive(self, record: GenerationRecord) -> Generation:
        """Makes a generation from the record of another replica that accepted it; nothing is started."""
        return self._factory.revive(record)

    def owned(self, generation: Generation) -> bool:
        """Registers a generation that this replica owns from now on.

        Returns:
            Whether it runs; otherwise it is suspended until a stream comes.
        """
        self._live[generation.identifier] = generation
        request = generation.request
        if request.request_id:
            with contextlib.suppress(QueueFullError):  # then only Redis remembers the request id
                self._requests.remember(
                    generation.caller, request.request_id, request.body_digest, generation.identifier
                )
        if generation.log.watchers or request.disconnect.detach:
            if generation.state is GenerationState.SUSPENDED:  # its last owner had no stream for it
                generation.resume()
            return True
        self._suspend(generation)
        return False

    def wanted(self, identifier: str) -> None:
        """Hands a suspended generation over, since another replica has a stream for it."""
        if (generation := self._live.get(identifier)) is not None and generation.state is GenerationState.SUSPENDED:
            self._move(generation)

    def _move(self, generation: Generation) -> None:
        """Lets another replica continue the generation."""
        assert self._ownership is not None
        self._ownership.owners.let_go(generation)
        self.moved(generation)

    def moved(self, generation: Generation) -> None:
        """Removes a generation that another replica owns from now on, and ends its streams with MOVED."""
        self._forget(generation)
        self._finished.remove(generation)
        self._requests.forget(generation.caller, generation.request.request_id, generation.identifier)
        self._streams.move(generation)

    def _asked_to_cancel(self, identifier: str, _facts: Mapping[str, str]) -> None:
        if (generation := self._live.get(identifier)) is not None and generation.may_decide:
            generation.stop(GenerationCancelledError("it was cancelled"))

    def _asked_for_priority(self, identifier: str, facts: Mapping[str, str]) -> None:
        if (generation := self._live.get(identifier)) is not None:
            generation.set_priority(Priority(int(facts["priority"])))

    # --- in the background ---

    @property
    def ownership(self) -> Ownership | None:
        """The ownership of generations among replicas; None: there is only this replica."""
        return self._ownership

    async def tick(self) -> None:
        """Every 0.25 s, until cancelled: queue positions, stalled streams, old generations. Every second: pressure."""
        loop = asyncio.get_running_loop()
        num_ticks = 0
        while True:
            began = loop.time()
            await asyncio.sleep(TICK_S)
            self._metrics.loop_lag.observe(max(0.0, loop.time() - began - TICK_S))
            publish_queue_positions(self._engine.scheduler, self._live.values(), self._now())
            num_ticks += 1
            if num_ticks % TICKS_PER_PRESSURE == 0:
                scheduler = self._engine.scheduler
                self._pressure.update(scheduler.left_by_class_s(), scheduler.num_instances)
            now = self._clock()
            for watcher in self._streams.stalled(now, self._settings.watcher_stall_s):
                self._end_stalled(watcher)
            self._unread.relieve(self._live.values(), now)
            self._finished.trim()

    def _end_stalled(self, watcher: Watcher) -> None:
        error = UnavailableError("the stream was not read; WatchGeneration resumes it", reason="WATCHER_STALLED")
        if (generation := self._streams.end(watcher, error)) is not None:
            self._stream_left(generation)

    async def drain(self, grace_s: float) -> None:
        """Refuses new generations, lets those that run finish and be delivered within `grace_s`, and ends the rest."""
        self._draining = True
        if self._ownership is not None:
            self._ownership.mirrors.retire()
        for generation in [g for g in self._live.values() if g.state is GenerationState.SUSPENDED]:
            self._end_drained(generation)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._live:
                    self._generation_ended.clear()
                    await self._generation_ended.wait()
                await self._streams.delivered()
        for generation in self._streams.not_owned():
            self._streams.move(generation)
            self._drop_unwatched(generation)
        for generation in [*self._streams.undelivered(), *self._live.values()]:
            self._end_drained(generation)

    def _end_drained(self, generation: Generation) -> None:
        if generation.durability is Durability.REPLICATED:
            self._move(generation)
        elif generation.ended:
            self._streams.end_all(generation, outcomes.drained(generation))
        else:
            generation.stop(outcomes.drained(generation), FinishReason.FAILED)
