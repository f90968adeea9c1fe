"""A replica: the real registry, ownership and cluster code, over an engine that only counts steps."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from safelight_server.cache.cache import CacheQuery, facts_of
from safelight_server.cache.checkpoints import CheckpointPolicy, Checkpoints
from safelight_server.cache.namespaces import Namespaces
from safelight_server.cache.pictures import CachedPicture, Pictures
from safelight_server.catalog.catalog import Catalog
from safelight_server.cluster.bulletin import Bulletin
from safelight_server.cluster.leased_runners import LeasedRunners
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import DeadlineExceededError, SafelightError
from safelight_server.domain.picture import Pixels
from safelight_server.domain.request import MediaType, PixelEncoding, PreviewMethod, PreviewPolicy, Request
from safelight_server.domain.tensors import FloatArray
from safelight_server.engine.jobs import Job
from safelight_server.engine.latents import Snapshot
from safelight_server.engine.observer import ExecutionObserver
from safelight_server.generations.execution import Executions
from safelight_server.generations.generation import Generation
from safelight_server.generations.ownership import ClusterContext
from safelight_server.generations.registry import Generations
from safelight_server.runtime.simulated import LATENT, simulated_pipeline
from safelight_server.settings import Settings
from safelight_server.storage.clock import SharedClock
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.memory import MemoryStore
from safelight_server.storage.sealed import Sealer
from safelight_server.storage.tiers import Tier, Tiers
from safelight_server.telemetry import UNTRACED, Metrics
from safelight_server.telemetry.metrics import TierMetrics

from tests.simulation.clock import Host, VirtualLoop
from tests.simulation.service import Connection, Network, RemoteCoordinator, RemoteStore, Service
from tests.support.streams import Here

TTL_S = 1.5
RAW = PixelEncoding(MediaType.RAW_RGBA8)
NO_PREVIEWS = PreviewPolicy(encoding=RAW, method=PreviewMethod.NONE)
KEYS = Keyring.random()
SEALER = Sealer(KEYS)
SETTINGS = Settings(runtime="simulated", result_ttl_s=600.0, idempotency_ttl_s=600.0)
PIPELINE = simulated_pipeline()
METRICS = Metrics()
TIER_METRICS = TierMetrics(CollectorRegistry())
SIZE_PX = 4

Say = Callable[[str, object], None]
"""Takes what a stream is sent: "event" with its bytes, "error" with the SafelightError, or "end"."""


@functools.cache
def image(seed: int) -> FloatArray:
    """The picture of a seed, as a decoder gives it."""
    pixels = np.full((3, SIZE_PX, SIZE_PX), (seed % 251) / 125.0 - 1.0, np.float32)
    pixels.flags.writeable = False
    return pixels


class NoImages:
    """No request brings a picture; see `InitImages`."""

    async def keep_outputs(self, _generation: object, _find: object) -> None:
        """None to keep."""

    async def load(self, _tenant: str, _spec: object, *, needs_mask: bool) -> None:
        """None to begin from."""

    async def load_controls(self, _tenant: str, _spec: object, _offered: object) -> tuple[()]:
        """None for control networks."""
        return ()

    async def load_image_prompt(self, _tenant: str, _spec: object, _room: object) -> None:
        """None as a prompt."""


class CountingEngine:
    """Makes the steps of jobs on time and the picture of their seed, and computes nothing; see `Engine`."""

    def __init__(self, loop: VirtualLoop, step_s: float) -> None:
        self.scheduler = self
        self.outage = self
        self.is_on = False
        self.num_outputs = self.num_running = 0
        self._loop = loop
        self._step_s = step_s
        self._running: dict[int, tuple[Job, int, Any, asyncio.TimerHandle]] = {}

    def late(self) -> SafelightError:
        return DeadlineExceededError("the deadline passed")

    def num_waiting(self, priority: object = None) -> int:
        return 0

    def submit(self, job: Job, listener: Any) -> None:
        self._next(job, job.start.step if job.start else 0, listener, self._loop.call_soon(listener.started))

    def _next(self, job: Job, step: int, listener: Any, _: object = None) -> None:
        timer = self._loop.call_later(self._step_s, self._stepped, job, step, listener)
        self._running[job.output_id] = job, step, listener, timer

    def _stepped(self, job: Job, step: int, listener: Any) -> None:
        if step >= job.table.num_steps:
            del self._running[job.output_id]
            listener.decoded(image(job.seed))
            return
        step += 1
        listener.computed(self._step_s, 1)
        listener.stepped(step, 1)
        if job.output_id in self._running:
            self._next(job, step, listener)
            if step < job.table.num_steps and listener.wants_checkpoint(step):
                listener.checkpoint(_snapshot(step))

    def suspend(self, output_id: int) -> Snapshot | None:
        job, step, _, timer = self._running.pop(output_id, (None, 0, None, None))
        if timer is not None:
            timer.cancel()
        return _snapshot(step) if job is not None and step else None

    def reschedule(self, output_id: int, priority: int, deadline: float | None) -> None:
        pass

    async def preview(self, job: Job, denoised: FloatArray, component: object) -> None:
        return None

    def follow(self, output_id: int) -> None:
        pass

    def unfollow(self, output_id: int) -> None:
        pass

    def load(self) -> float:
        return 0.0


@functools.cache
def _snapshot(step: int) -> Snapshot:
    latent = np.full(LATENT, step, np.float32)
    latent.flags.writeable = False
    return Snapshot(step, latent, latent)


class ModelRuntime:
    """What the planner asks the runtime."""

    def numerics_id(self, model: str) -> str:
        return "simulated"

    def batch_tolerance(self, model: str) -> float:
        return 0.0


class CountingRecorder(ExecutionObserver):
    """Keeps checkpoints, as the cache does."""

    def __init__(self, cache: SmallCache, wanted: CacheQuery) -> None:
        self.there = False
        self._cache = cache
        self._wanted = wanted

    def wants_checkpoint(self, step: int) -> bool:
        return step % 2 == 0

    def checkpoint(self, snapshot: Snapshot) -> None:
        name = self._wanted.name
        steps = self._wanted.spec.num_inference_steps
        kept = self._cache.checkpoints.keep(name.namespace.name, name.exact, snapshot, steps, replicate=True)
        self._cache.tasks.add(task := asyncio.ensure_future(kept))
        task.add_done_callback(self._cache.tasks.discard)


class SmallCache:
    """Exact pictures and checkpoints, as of the cache; nothing approximate."""

    def __init__(self, tiers: Tiers) -> None:
        self.namespaces = Namespaces(KEYS, {})
        self.pictures = Pictures(tiers, KEYS, Here(), 600.0)
        self.checkpoints = Checkpoints(tiers, KEYS, CheckpointPolicy(2))
        self.tasks: set[Any] = set()

    async def exact(self, wanted: CacheQuery) -> CachedPicture | None:
        return await self.pictures.get(wanted.name, wanted.encoding)

    async def approximate(self, wanted: CacheQuery, *, latents: bool = True) -> None:
        return None

    async def embeddings(self, wanted: CacheQuery) -> tuple[None, ...]:
        return (None,)

    def record(self, wanted: CacheQuery, keep: object) -> CountingRecorder:
        return CountingRecorder(self, wanted)

    async def replicate(
        self, wanted: CacheQuery, pointer: str, pixels: Pixels, compute_s: float, ttl_s: float | None
    ) -> bool:
        facts = facts_of(wanted, compute_s)
        return await self.pictures.put(pointer, pixels, facts, replicate=True, ttl_s=ttl_s)

    def owner(self, wanted: CacheQuery) -> object:
        return self.namespaces.owner(wanted.name.namespace, wanted.revision, wanted.generation)


class Replica:
    """A process that serves; `kill` and start another to restart it."""

    def __init__(
        self, name: str, loop: VirtualLoop, network: Network, service: Service, step_s: float, skew_s: float
    ) -> None:
        self.host = Host(name, skew_s)
        self.network = network
        self.streams: dict[asyncio.Task[None], Say] = {}
        self._loop = loop
        self.host.context.run(self._build, loop, network, service, step_s)

    def _build(self, loop: VirtualLoop, network: Network, service: Service, step_s: float) -> None:
        clock = SharedClock(lambda: time.time(), loop.time)
        sealer, connection = Sealer(KEYS, clock.now), Connection(network, service, clock)
        coordinator = RemoteCoordinator(connection, service)
        self.tiers = tiers = Tiers(
            [Tier(MemoryStore(1 << 24)), Tier(RemoteStore(connection, service), shared=True)], sealer, TIER_METRICS
        )
        cache: Any = SmallCache(tiers)
        engine: Any = CountingEngine(loop, step_s)
        bulletin = Bulletin(coordinator, sealer)
        self._runners = runners = LeasedRunners(
            engine, coordinator, sealer, cache.checkpoints, cache.pictures, bulletin, Here(), TTL_S, 600.0
        )
        context = ClusterContext(coordinator, sealer, KEYS, tiers, cache.namespaces, bulletin, TTL_S, 600.0, 600.0)
        runtime: Any = ModelRuntime()
        executions = Executions(engine, Here())
        catalog = Catalog([PIPELINE], "")
        images: Any = NoImages()
        self.generations = Generations(
            SETTINGS, catalog, runtime, engine, cache, executions, loop.time, METRICS, images, runners, context
        )
        self.generations._planner._admit = lambda *_: 0.0  # type: ignore[method-assign]  # there is always room
        ownership = self.generations.ownership
        assert ownership is not None
        works = bulletin.listen(), bulletin.talk(), runners.watch_service(), ownership.mirrors.sweep()
        self._works = [loop.create_task(work) for work in works]

    def kill(self) -> None:
        """As SIGKILL; its streams' clients see the connection go."""
        self.host.dead = True
        self._loop.freeze(self.host)
        for say in self.streams.values():
            say("gone", None)
        self.streams.clear()

    async def stop(self, grace_s: float) -> None:
        """As SIGTERM: what can be finished within the grace is, the rest is handed over, then the process ends."""
        await self._loop.create_task(self._drain(grace_s), context=self.host.context.copy())
        self.kill()

    async def _drain(self, grace_s: float) -> None:
        await self.generations.drain(grace_s)
        for work in self._works:
            work.cancel()
        assert self.generations.ownership is not None
        await self.generations.ownership.close()
        await self._runners.close()

    def generate(self, caller: Caller, request: Request, left_s: float | None, say: Say) -> asyncio.Task[None]:
        """A call of Generate; `left_s`: to its deadline."""
        return self._serve(functools.partial(self._generate, caller, request, left_s, say), say)

    def watch(
        self, caller: Caller, identifier: str, after: int, offsets: Mapping[int, int], say: Say
    ) -> asyncio.Task[None]:
        """A call of WatchGeneration."""
        return self._serve(functools.partial(self._watch, caller, identifier, after, offsets, say), say)

    def cancel(self, caller: Caller, identifier: str, say: Say) -> asyncio.Task[None]:
        """A call of CancelGeneration."""
        return self._serve(functools.partial(self._cancel, caller, identifier, say), say)

    def _serve(self, work: Callable[[], Any], say: Say) -> asyncio.Task[None]:
        async def serving() -> None:
            try:
                await work()
                say("end", None)
            except SafelightError as error:
                say("error", error)

        task = self._loop.create_task(serving(), context=self.host.context.copy())
        self.streams[task] = say
        task.add_done_callback(lambda done: self.streams.pop(done, None))
        return task

    async def _generate(self, caller: Caller, request: Request, left_s: float | None, say: Say) -> None:
        generation = await self.generations.start(caller, request, UNTRACED, left_s)
        await self._stream(generation, request.preview, 0, {}, say)

    async def _watch(self, caller: Caller, identifier: str, after: int, offsets: Mapping[int, int], say: Say) -> None:
        generation = await self.generations.find(caller, identifier)
        await self._stream(generation, NO_PREVIEWS, after, offsets, say)

    async def _cancel(self, caller: Caller, identifier: str, say: Say) -> None:
        generation = await self.generations.find(caller, identifier)
        await self.generations.cancel(generation)
        say("view", generation.view())

    async def _stream(
        self, generation: Generation, policy: PreviewPolicy, after: int, offsets: Mapping[int, int], say: Say
    ) -> None:
        ended: list[SafelightError] = []
        watcher = self.generations.attach(generation, policy, ended.append, after, offsets)
        try:
            async for event in watcher.events():
                say("event", event)
        finally:
            self.generations.detach(watcher)
        if ended:
            raise ended[0]
        if generation.error is not None:
            raise generation.error
