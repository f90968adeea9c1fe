"""Builds every part of the server and starts it (the composition root).

Only this module knows all parts. It gives each part the settings that concern it. `listening.py` opens the ports and
drains.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from safelight_server.api.call_limits import CallLimits, KeylessQuota
from safelight_server.api.health import HEALTH_SERVICE
from safelight_server.api.images import ImageCalls, UploadRoom
from safelight_server.api.quota import StreamQuota
from safelight_server.api.reflection import REFLECTION_SERVICES
from safelight_server.api.service import Service
from safelight_server.app.address import BindError, sole_listener
from safelight_server.app.backends import Backends, CredentialsError, open_backends
from safelight_server.app.callers import build_identity
from safelight_server.app.certificate import CertificateError, ServerCertificate
from safelight_server.app.errors import StartError
from safelight_server.app.grpc_server import MAX_KEYLESS_STREAMS
from safelight_server.app.http_server import HttpPort
from safelight_server.app.listening import listening, serving_metrics
from safelight_server.cache.admin import CacheAdmin
from safelight_server.cache.approximate.buckets import RedisBuckets
from safelight_server.cache.approximate.eviction import LeastBenefit
from safelight_server.cache.approximate.lsh import BucketStore, MemoryBuckets
from safelight_server.cache.approximate.similar import SimilarPictures
from safelight_server.cache.approximate.skip_policy import SkipPolicy
from safelight_server.cache.approximate.vectors import Vectors
from safelight_server.cache.approximate.warm_starts import WarmStarts
from safelight_server.cache.cache import Cache
from safelight_server.cache.checkpoints import CheckpointPolicy, Checkpoints
from safelight_server.cache.images import Images
from safelight_server.cache.namespaces import Namespaces
from safelight_server.cache.pictures import Pictures
from safelight_server.cache.prompts import Prompts
from safelight_server.cache.purges import Purges
from safelight_server.catalog import catalog as catalogs
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.catalog import Catalog
from safelight_server.cluster.bulletin import Bulletin
from safelight_server.cluster.leased_runners import LeasedRunners
from safelight_server.coordination.buckets import SharedTokenBuckets
from safelight_server.engine.engine import Engine
from safelight_server.generations.execution import Executions
from safelight_server.generations.init_images import InitImages
from safelight_server.generations.inspection import Inspection
from safelight_server.generations.ownership import ClusterContext
from safelight_server.generations.registry import Generations
from safelight_server.prices import compute_price
from safelight_server.quality import Judge, QualityProbe
from safelight_server.quotas.limits import watch
from safelight_server.quotas.quotas import Quotas
from safelight_server.runtime.base import Runtime, RuntimeStartError
from safelight_server.runtime.simulated import SimulatedRuntime, simulated_pipeline
from safelight_server.runtime.torch_options import TorchOptions
from safelight_server.runtime.triton import TritonOptions, TritonRuntime
from safelight_server.scheduler import Priority
from safelight_server.settings import Settings, is_loopback
from safelight_server.storage.disk import DiskStoreError
from safelight_server.storage.keyring import KeyringError
from safelight_server.telemetry import Metrics, Tracing
from safelight_server.validation import RequestLimits

log = structlog.get_logger(__name__)

LEAST_PARKED, PARKED_PER_RUNNING = 256, 4
"""Bound on parked outputs, which keep their latents while others have their slots: the larger of the first number and
the second times the running outputs. No output is preempted beyond it (decision record 0016). With a smaller bound, a
burst of a higher class would have to wait; each parked output costs the memory of its latents."""
TORCH = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
"""What the extra `torch` installs and the runtime of that name imports."""
INDEXED_ITEMS = 10_000
"""Per namespace: outputs whose latents others may start from, and newest pictures that are scanned for similar ones.
The time of a scan grows with it; decision record 0014 has figures."""


@dataclass(frozen=True, slots=True)
class Running:
    """A running server, and the parts that tests inspect.

    Attributes:
        address: HOST:PORT or unix:PATH that it listens on; for port 0 with the port that was chosen.
        drain: starts a shutdown that gives generations so many seconds; a second call with fewer shortens the first.
        http_address: HOST:PORT of HTTP; empty if that is off.
        uploads: the room that uploads in progress take.
    """

    address: str
    catalog: Catalog
    runtime: Runtime
    cache: Cache
    generations: Generations
    streams: StreamQuota
    quotas: Quotas
    limits: CallLimits
    drain: Callable[[float], asyncio.Task[None]]
    http_address: str
    uploads: UploadRoom

    def inspect(self) -> Inspection:
        """Counts what the server holds now."""
        return self.generations.inspect()


def build_runtime(settings: Settings) -> tuple[Catalog, Runtime]:
    """Loads the catalog of models and builds the runtime that executes them.

    Raises:
        ManifestError: a model's files are missing or malformed.
        RuntimeStartError: what the runtime needs is not installed, or not on this machine.
    """
    if settings.runtime == "simulated":
        runtime = SimulatedRuntime(
            max(1, settings.num_instances), settings.simulated_base_ms / 1e3, settings.simulated_row_ms / 1e3
        )
        return Catalog([simulated_pipeline()], settings.default_model), runtime
    if settings.runtime == "torch" and (lacking := [name for name in TORCH if importlib.util.find_spec(name) is None]):
        raise RuntimeStartError(
            f"{', '.join(lacking)} not installed: in a clone of Safelight, pip install -e clients/python -e '.[torch]'"
        )
    catalog = catalogs.load(
        settings.models_dir,
        settings.default_model,
        require_all=settings.require_all_models,
        weights="torch" if settings.runtime == "torch" else "onnx",
    )
    rooms = {name: at.manifest.adapters for name, at in catalog.pipelines.items() if at.manifest.adapters is not None}
    folder = settings.adapters_dir or settings.models_dir / "adapters"
    found = {name: at.manifest.text_adapters for name, at in catalog.pipelines.items()}
    text_rooms = {name: room for name, room in found.items() if room is not None}
    catalog.adapters = AdapterLibrary(folder, rooms, settings.max_adapter_bytes, text_rooms)
    if settings.runtime == "triton":
        options = TritonOptions(
            urls=settings.triton_urls,
            shared_memory=settings.triton_shared_memory,
            calls_each=settings.triton_instances,
            timeout_floor_s=settings.triton_timeout_floor_s,
            start_s=settings.triton_start_s,
        )
        return catalog, TritonRuntime(catalog, options)
    if settings.runtime == "torch":
        from safelight_server.runtime.torch_runtime import TorchRuntime  # imports torch

        chosen = TorchOptions(
            settings.torch_device, settings.torch_dtype, settings.torch_batch_tolerance, settings.num_instances
        )
        return catalog, TorchRuntime(catalog, chosen)
    from safelight_server.runtime.onnx import OnnxRuntime  # imported here: the other runtimes must not load onnxruntime

    return catalog, OnnxRuntime(catalog, settings.num_instances)


@contextlib.asynccontextmanager
async def serving(settings: Settings, wall: Callable[[], float] = time.time) -> AsyncIterator[Running]:
    """Runs the server while the block runs. Closes every part at the end, also if the start fails.

    Args:
        wall: this machine's clock, in Unix seconds.

    Raises:
        StartError: the runtime, the storage or the address cannot be used.
        ManifestError: a model's files are missing or malformed.
        ConfigFileError: the file of the callers' keys, of the quotas or of the prices cannot be used.
    """
    async with contextlib.AsyncExitStack() as ends:  # closes parts in the reverse order of their start
        clock = time.monotonic
        metrics = Metrics()
        headers, requested_per_s = settings.otlp_header_pairs, settings.trace_requested_per_s
        tracer = Tracing(settings.otlp_endpoint, settings.trace_ratio, headers, requested_per_s)
        ends.push_async_callback(asyncio.to_thread, tracer.close)
        identity = build_identity(settings, all_admins=is_loopback(settings.host), wall=wall)
        limits_of_tenants = None if settings.quota_file is None else watch(settings.quota_file)
        price = None if settings.price_file is None else compute_price(settings.price_file, settings.instance_type)
        if price is not None:
            metrics.price(price.currency, price.per_s, price.machine_per_hour)
        pool = ends.enter_context(ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0))), thread_name_prefix="pixels"))
        try:
            catalog, runtime = build_runtime(settings)
        except RuntimeStartError as error:
            raise StartError(str(error)) from None
        ends.push_async_callback(runtime.close)
        try:
            ends.enter_context(sole_listener(settings.host))
            await runtime.start()
            for left_out in catalog.unavailable.values():
                log.error("model_left_out", model=left_out.name, revision=left_out.revision, reason=left_out.reason)
            backends = await open_backends(settings, metrics.tiers, wall)
        except (BindError, RuntimeStartError, KeyringError, DiskStoreError, CredentialsError, ValueError) as error:
            raise StartError(str(error)) from None
        ends.push_async_callback(backends.close)
        shared = None if backends.redis is None else SharedTokenBuckets(*backends.redis)
        quotas = Quotas(limits_of_tenants, shared, functools.partial(backends.keyring.digest, "quota"))
        ends.push_async_callback(quotas.close)
        engine = Engine(
            runtime,
            clock,
            metrics,
            max_running=settings.max_running_outputs,
            max_parked=max(LEAST_PARKED, PARKED_PER_RUNNING * settings.max_running_outputs),
            preview_share=settings.preview_share,
            runtime_wait_s=settings.runtime_wait_s,
            runtime_grace_s=settings.runtime_grace_s,
            tracer=tracer,
        )
        cache, purges = _build_cache(settings, backends, engine, runtime, pool, metrics)
        ends.push_async_callback(cache.close)
        judge = _judge(settings)
        probe = QualityProbe(settings.quality_sample_ratio, metrics.quality, pool, judge=judge)
        executions = Executions(engine, pool, probe)
        ends.push_async_callback(executions.close)
        ends.push_async_callback(engine.close)
        caches = CacheAdmin(cache.namespaces, backends.keyring, backends.tiers, purges, metrics)
        images = Images(
            backends.tiers,
            backends.keyring,
            cache.namespaces,
            ttl_s=settings.image_ttl_s,
            max_tenant_bytes=settings.max_images_bytes_per_tenant,
            shared=backends.redis is not None,
        )
        leased_runners, context = _build_replicas(settings, backends, cache, engine, pool) or (None, None)

        def charge(tenant: str, model: str, seconds: float) -> None:
            quotas.charge(tenant, seconds)
            metrics.tenants.computed(tenant, model, seconds)

        generations = Generations(
            settings,
            catalog,
            runtime,
            engine,
            cache,
            executions,
            clock,
            metrics,
            InitImages(images, pool, settings.max_image_pixels),
            leased_runners,
            context,
            charge,
            price,
        )
        limits = RequestLimits(
            settings.max_prompt_chars,
            settings.max_request_rows,
            settings.resume_grace_s,
            settings.max_resume_grace_s,
        )
        streams = StreamQuota(settings.max_streams_per_caller)
        uploads = UploadRoom(settings.max_image_bytes)
        image_calls = ImageCalls(images, uploads, pool, settings.max_image_bytes, settings.max_image_pixels)
        service = Service(
            identity, catalog, runtime, generations, caches, limits, streams, quotas, image_calls, metrics, tracer
        )
        certificate = _certificate(settings)
        http = HttpPort(settings, service, catalog, identity, metrics, certificate, image_calls)
        _watch_queue(metrics, engine, clock)
        metrics.watch_instances(runtime.num_instances, lambda: runtime.num_live)
        metrics.watch_streams(lambda: generations.inspect().streams)
        works = [generations.tick, purges.keep_up, catalog.adapters.follow, *identity.works, *quotas.works]
        if (ownership := generations.ownership) is not None and leased_runners is not None:
            ends.push_async_callback(leased_runners.close)
            ends.push_async_callback(ownership.close)
            works += [
                purges.listen,
                ownership.bulletin.listen,
                ownership.bulletin.talk,
                leased_runners.watch_service,
                ownership.mirrors.sweep,
            ]
        await ends.enter_async_context(serving_metrics(metrics, settings))
        keyless = KeylessQuota(MAX_KEYLESS_STREAMS, settings.max_keyless_streams_per_address)
        call_limits = CallLimits(settings.request_wait_s, (HEALTH_SERVICE, *REFLECTION_SERVICES), keyless, metrics)
        opening = listening(settings, certificate, service, http, call_limits, engine, generations, works)
        async with opening as (address, drain):
            yield Running(
                address,
                catalog,
                runtime,
                cache,
                generations,
                streams,
                quotas,
                call_limits,
                drain,
                http.address,
                uploads,
            )


def _judge(settings: Settings) -> Judge | None:
    """The judge of prompt agreement, if one is set.

    Raises:
        StartError: the folder is no judge.
    """
    if settings.quality_judge_dir is None:
        return None
    from safelight_server.quality.judge import JudgeError, PromptJudge  # imports onnxruntime

    try:
        return PromptJudge(settings.quality_judge_dir)
    except JudgeError as error:
        raise StartError(f"quality_judge_dir: {error}") from None


def _build_replicas(
    settings: Settings, backends: Backends, cache: Cache, engine: Engine, pool: ThreadPoolExecutor
) -> tuple[LeasedRunners, ClusterContext] | None:
    """Builds the parts that replicas on one Redis need to work together; None without Redis."""
    if backends.coordinator is None:
        return None
    coordinator, sealer, ttl_s = backends.coordinator, backends.sealer, settings.lease_ttl_s
    bulletin = Bulletin(coordinator, sealer)
    checkpoints, pictures, kept_s = cache.checkpoints, cache.pictures, settings.result_ttl_s
    leased_runners = LeasedRunners(engine, coordinator, sealer, checkpoints, pictures, bulletin, pool, ttl_s, kept_s)
    context = ClusterContext(
        coordinator,
        sealer,
        backends.keyring,
        backends.tiers,
        cache.namespaces,
        bulletin,
        ttl_s,
        kept_s,
        settings.idempotency_ttl_s,
    )
    return leased_runners, context


def _build_cache(
    settings: Settings,
    backends: Backends,
    engine: Engine,
    runtime: Runtime,
    pool: ThreadPoolExecutor,
    metrics: Metrics,
) -> tuple[Cache, Purges]:
    """Builds the cache over the open tiers, and the purges that delete from it on every replica."""
    tiers, keyring, ttl_s = backends.tiers, backends.keyring, settings.cache_ttl_s
    skip_policy = SkipPolicy()
    alone = settings.redis_url is None  # then no other replica could resume from checkpoints
    often = 0 if alone else settings.checkpoint_every_n_steps
    policy = CheckpointPolicy(often, skip_policy.fractions, ttl_s=ttl_s)
    checkpoints = Checkpoints(tiers, keyring, policy)
    pictures = Pictures(tiers, keyring, pool, ttl_s)
    buckets: BucketStore = MemoryBuckets(settings.cache_similar_items)
    if backends.redis is not None:
        most = settings.cache_similar_items
        buckets = RedisBuckets(*backends.redis, backends.sealer, ttl_s=ttl_s, max_items=most)
    similar = SimilarPictures(pictures, buckets, INDEXED_ITEMS, settings.cache_similar_uses, metrics.cache.rejected)
    eviction = LeastBenefit(settings.cache_latent_bytes)
    warm_starts = WarmStarts(checkpoints, Vectors(tiers, ttl_s), skip_policy, eviction, INDEXED_ITEMS)
    namespaces = Namespaces(keyring, settings.cache_pools)
    prompts = Prompts(tiers, engine.encode, runtime.numerics_id, ttl_s)
    shared = backends.redis is not None
    cache = Cache(namespaces, pictures, prompts, checkpoints, similar, warm_starts, metrics.cache, shared=shared)
    return cache, Purges(tiers, backends.coordinator, (similar, warm_starts, checkpoints))


def _watch_queue(metrics: Metrics, engine: Engine, clock: Callable[[], float]) -> None:
    """Lets the gauges of waiting and running outputs read the scheduler when they are scraped."""
    scheduler = engine.scheduler
    classes = {priority.name.lower(): priority for priority in Priority}
    metrics.watch_queue(
        lambda name: scheduler.num_waiting(classes[name]),
        lambda: scheduler.num_running,
        lambda: scheduler.num_parked,
        scheduler.backlog_s,
    )
    metrics.watch_demand(
        lambda name: scheduler.left_by_class_s()[classes[name]], lambda within_s: scheduler.due_s(clock() + within_s)
    )


def _certificate(settings: Settings) -> ServerCertificate | None:
    """The TLS certificate; None if none is configured.

    Raises:
        StartError: the certificate cannot be used.
    """
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    try:
        return ServerCertificate(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
    except CertificateError as error:
        raise StartError(str(error)) from None
