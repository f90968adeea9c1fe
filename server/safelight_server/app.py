"""The composition root: builds every stage, starts the server, drains it.

The one place that knows all stages and hands each its settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from safelight_server import catalog as catalogs
from safelight_server import reflection
from safelight_server.cache.admin import CacheAdmin
from safelight_server.cache.backends import Backends, open_backends
from safelight_server.cache.bands import Bands
from safelight_server.cache.buckets import RedisBuckets
from safelight_server.cache.cache import Cache
from safelight_server.cache.checkpoints import Checkpoints, Policy
from safelight_server.cache.eviction import LeastBenefit
from safelight_server.cache.lsh import BucketStore, MemoryBuckets
from safelight_server.cache.pictures import Pictures
from safelight_server.cache.prompts import Prompts
from safelight_server.cache.purges import Purges
from safelight_server.cache.similar import SimilarPictures
from safelight_server.cache.spaces import Spaces
from safelight_server.cache.starts import Starts
from safelight_server.cache.vectors import Vectors
from safelight_server.catalog import Catalog
from safelight_server.engine import Engine
from safelight_server.fleet import Ground
from safelight_server.generations import Generations
from safelight_server.identity import Identity
from safelight_server.quota import StreamQuota
from safelight_server.replicas.flights import Flights
from safelight_server.replicas.news import News
from safelight_server.resolve import RequestLimits
from safelight_server.runtime.base import Runtime, RuntimeStartError
from safelight_server.runtime.onnx import OnnxRuntime
from safelight_server.runtime.simulated import SimulatedRuntime, simulated_pipeline
from safelight_server.runtime.triton import TritonOptions, TritonRuntime
from safelight_server.scheduler import Priority
from safelight_server.service import CACHE_SERVICE, GENERATION_SERVICE, MODEL_SERVICE, Service
from safelight_server.settings import Settings, is_loopback
from safelight_server.telemetry import Metrics, Tracing

log = structlog.get_logger(__name__)

REQUEST_BYTES = 64 << 10
"""Room for all of a request but its prompts."""
HEALTH_PERIOD_S = 0.25
GRPC_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the port fails instead of taking half of the calls
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # a frozen peer is not seen by keepalive_timeout_ms alone
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class StartError(Exception):
    """The server cannot start; the message says why."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that serves. `drain` ends it."""

    address: str
    catalog: Catalog
    runtime: Runtime
    cache: Cache
    generations: Generations
    streams: StreamQuota
    drain: Callable[[float], asyncio.Task[None]]


def build_runtime(settings: Settings) -> tuple[Catalog, Runtime]:
    """The pipelines and what executes them."""
    if settings.runtime == "simulated":
        runtime = SimulatedRuntime(
            max(1, settings.num_instances), settings.simulated_base_ms / 1e3, settings.simulated_row_ms / 1e3
        )
        return Catalog([simulated_pipeline()]), runtime
    catalog = catalogs.load(settings.models_dir, settings.default_model)
    if settings.runtime == "triton":
        options = TritonOptions(
            urls=settings.triton_urls,
            shared_memory=settings.triton_shared_memory,
            calls_each=settings.triton_instances,
            timeout_factor=settings.triton_timeout_factor,
            timeout_floor_s=settings.triton_timeout_floor_s,
            probe_max_s=settings.triton_probe_max_s,
            start_s=settings.triton_start_s,
        )
        return catalog, TritonRuntime(catalog, options)
    return catalog, OnnxRuntime(catalog, settings.num_instances)


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Running]:
    """Serves while the block runs; on leaving, whatever is left ends."""
    clock = time.monotonic
    metrics, tracer = Metrics(), Tracing(settings.otlp_endpoint, settings.trace_ratio, settings.otlp_header_pairs)
    identity = Identity(settings.api_key_file, all_admins=is_loopback(settings.host))
    catalog, runtime = build_runtime(settings)
    try:
        await runtime.start()
    except RuntimeStartError as error:
        raise StartError(str(error)) from None
    pool = ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0))), thread_name_prefix="pixels")
    engine = Engine(
        runtime,
        clock,
        metrics,
        max_running=settings.max_running_outputs,
        preview_share=settings.preview_share,
        runtime_wait_s=settings.runtime_wait_s,
        runtime_grace_s=settings.runtime_grace_s,
        tracer=tracer,
    )
    backends = await open_backends(settings, metrics.tiers)
    cache, purges = _build_cache(settings, backends, engine, pool, metrics)
    caches = CacheAdmin(cache.spaces, backends.keyring, backends.tiers, purges, metrics)
    flights, ground = _build_replicas(settings, backends, cache, engine, pool) or (None, None)
    generations = Generations(settings, catalog, runtime, engine, cache, pool, clock, metrics, flights, ground)
    limits = RequestLimits(settings.max_prompt_chars, settings.resume_grace_s, settings.max_resume_grace_s)
    quota = StreamQuota(settings.max_streams_per_caller)
    service = Service(identity, catalog, runtime, generations, caches, limits, quota, metrics, tracer)
    _watch_queue(metrics, engine)

    largest = REQUEST_BYTES + 2 * 4 * settings.max_prompt_chars  # two prompts, at most four bytes a character
    server = grpc.aio.server(options=[*GRPC_OPTIONS, ("grpc.max_receive_message_length", largest)])
    server.add_generic_rpc_handlers(tuple(service.handlers()))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    services = [GENERATION_SERVICE, MODEL_SERVICE, CACHE_SERVICE, health.SERVICE_NAME]
    reflection.enable(services, server)
    address = _bind(server, settings)
    if settings.metrics_port:
        metrics.serve(settings.host if settings.insecure else "127.0.0.1", settings.metrics_port)
    await server.start()
    for name in ("", *services):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    works = [generations.tick(), purges.keep_up(), purges.listen()]
    if (fleet := generations.fleet) is not None and flights is not None:
        works += [fleet.news.listen(), fleet.news.talk(), flights.watch_service(), fleet.mirrors.sweep()]
    background = [asyncio.create_task(work) for work in works]
    following = asyncio.create_task(_follow_health(health_servicer, ("", *services), engine))

    async def drain(grace_s: float) -> None:
        log.info("draining", grace_s=grace_s)
        following.cancel()
        await health_servicer.enter_graceful_shutdown()
        await generations.drain(grace_s)
        await server.stop(1.0)

    draining: list[asyncio.Task[None]] = []

    def start_drain(grace_s: float) -> asyncio.Task[None]:
        if not draining:
            draining.append(asyncio.create_task(drain(grace_s)))
        return draining[0]

    try:
        yield Running(address, catalog, runtime, cache, generations, quota, start_drain)
    finally:
        await start_drain(0.0)
        for task in background:
            task.cancel()
        await asyncio.wait(background)
        if fleet is not None and flights is not None:
            await fleet.close()
            await flights.close()
        await engine.close()
        await cache.close()
        await backends.close()
        await runtime.close()
        pool.shutdown()
        await asyncio.to_thread(tracer.close)


def _build_replicas(
    settings: Settings, backends: Backends, cache: Cache, engine: Engine, pool: ThreadPoolExecutor
) -> tuple[Flights, Ground] | None:
    """What makes this replica one of several; None: it is alone."""
    if backends.redis is None:
        return None
    coordinator, sealer, ttl_s = backends.coordinator, backends.sealer, settings.lease_ttl_s
    news = News(coordinator, sealer)
    flights = Flights(engine, coordinator, sealer, cache.checkpoints, cache.pictures, news, pool, ttl_s)
    ground = Ground(
        coordinator,
        sealer,
        backends.keyring,
        backends.tiers,
        cache.spaces,
        news,
        ttl_s,
        settings.result_ttl_s,
        settings.idempotency_ttl_s,
    )
    return flights, ground


def _build_cache(
    settings: Settings, backends: Backends, engine: Engine, pool: ThreadPoolExecutor, metrics: Metrics
) -> tuple[Cache, Purges]:
    tiers, keyring, ttl_s = backends.tiers, backends.keyring, settings.cache_ttl_s
    bands = Bands()
    alone = settings.redis_url is None  # then nobody could go on from where it stopped
    often = 0 if alone else settings.checkpoint_every_n_steps
    policy = Policy(often, bands.fractions, ttl_s=ttl_s)
    checkpoints = Checkpoints(tiers, keyring, policy)
    pictures = Pictures(tiers, keyring, pool, ttl_s)
    buckets: BucketStore = MemoryBuckets(settings.cache_similar_items)
    if backends.redis is not None:
        most = settings.cache_similar_items
        buckets = RedisBuckets(*backends.redis, backends.sealer, ttl_s=ttl_s, max_items=most)
    similar = SimilarPictures(pictures, buckets, settings.cache_latent_items, metrics.cache.rejected)
    books = LeastBenefit(settings.cache_latent_bytes)
    starts = Starts(checkpoints, Vectors(tiers, ttl_s), bands, books, settings.cache_latent_items)
    spaces = Spaces(keyring, settings.cache_pools)
    prompts = Prompts(tiers, engine.encode, ttl_s)
    shared = backends.redis is not None
    cache = Cache(spaces, pictures, prompts, checkpoints, similar, starts, metrics.cache, shared=shared)
    return cache, Purges(tiers, backends.coordinator, (similar, starts, checkpoints))


async def _follow_health(servicer: health.aio.HealthServicer, names: Sequence[str], engine: Engine) -> None:
    """Says NOT_SERVING while nothing has been there to execute models for longer than the grace; forever."""
    said = health_pb2.HealthCheckResponse.SERVING
    while True:
        status = health_pb2.HealthCheckResponse
        now = status.NOT_SERVING if engine.outage.beyond_grace else status.SERVING
        if now is not said:
            for name in names:
                await servicer.set(name, now)
            said = now
        await asyncio.sleep(HEALTH_PERIOD_S)


def _watch_queue(metrics: Metrics, engine: Engine) -> None:
    scheduler = engine.scheduler
    classes = {priority.name.lower(): priority for priority in Priority}
    metrics.watch_queue(lambda name: scheduler.num_waiting(classes[name]), lambda: scheduler.num_running)


def _bind(server: grpc.aio.Server, settings: Settings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host and not settings.host.startswith("unix:") else settings.host
    where = settings.host if settings.host.startswith("unix:") else f"{host}:{settings.port}"
    try:
        if settings.tls_cert_file and settings.tls_key_file:
            pair = settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes()
            port = server.add_secure_port(where, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(where)
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None
    except RuntimeError:
        raise StartError(f"cannot bind {where}: is another server there?") from None
    return where if where.startswith("unix:") else f"{host}:{port}"


def settle() -> None:
    """Spares what start-up has made from garbage collection: looking at all of it stops the loop for 50 ms and more."""
    gc.collect()
    gc.freeze()


async def serve(settings: Settings, started: Callable[[Running], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the drain."""
    loop, signals = asyncio.get_running_loop(), asyncio.Queue[int]()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    async with serving(settings) as running:
        settle()
        started(running)
        await signals.get()
        drained = running.drain(settings.drain_grace_s)
        again = asyncio.create_task(signals.get())
        await asyncio.wait([drained, again], return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            await running.generations.drain(0.0)
        again.cancel()
