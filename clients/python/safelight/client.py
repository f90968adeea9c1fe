"""The asyncio client: streams a generation as events, and resumes it when the connection is lost."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, TypeAlias

import grpc

from safelight import proxies, tracing
from safelight.errors import GenerationError
from safelight.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    quotas_pb2,
    quotas_pb2_grpc,
)
from safelight.v1 import generation_pb2 as pb

CHANNEL_OPTIONS = [
    ("grpc.http2.bdp_probe", 0),  # with lookahead: previews wait at the server, where the newest wins, not here
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
CacheMode = Literal["default", "bypass", "latent", "similar"]
CACHE_MODES: Mapping[CacheMode, pb.CachePolicy.Mode.ValueType] = {
    "default": pb.CachePolicy.MODE_DEFAULT,
    "bypass": pb.CachePolicy.MODE_BYPASS,
    "latent": pb.CachePolicy.MODE_ALLOW_LATENT,
    "similar": pb.CachePolicy.MODE_ALLOW_SIMILAR,
}
"""Which cached results may answer a request; see `CachePolicy` in the proto."""
PATIENCE_S = 60.0
"""How long a generation whose connection is lost is asked for again, since its last event; longer than a restart."""
FIRST_PATIENCE_S = 5.0
"""At most this long while no event was received: whoever asks where no server is learns it soon."""
FIRST_WAIT_S, MAX_WAIT_S = 0.1, 2.0
"""Waits between two tries: doubled from the first to the longest, of which 50 to 100 % are waited, by chance."""
RESUMABLE = ("", "WATCHER_STALLED", "MOVED", "OTHER_MODEL")
"""Error reasons after which the same generation can be resumed; "" is a lost connection."""
ELSEWHERE = ("DRAINING", "UNAVAILABLE")
"""Error reasons after which the same call can succeed at another replica."""
OVER_QUOTA = ("REQUEST_RATE_EXCEEDED", "COMPUTE_QUOTA_EXCEEDED")
"""Error reasons after which the same call can succeed once the time of its RetryInfo has passed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """An output has finished a denoising step."""

    output_index: int
    step: int
    num_steps: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A preview of an output after `step` steps, encoded as `media_type`."""

    output_index: int
    step: int
    media_type: str
    width_px: int
    height_px: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture, encoded as `media_type`. Its SHA-256 has been checked."""

    output_index: int
    media_type: str
    width_px: int
    height_px: int
    seed: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a picture came from.

    Attributes:
        disposition: "miss" (computed in full), "coalesced" (shared with an identical output that was being computed),
            "exact" (cached, identical), "similar" (cached, for a similar prompt or another seed), "latent" (computed
            from the cached latent of a similar prompt) or "branched" (computed from the step of `branch`).
        similarity: cosine similarity of the prompts, for "similar" and "latent".
        source: the generation that computed the picture, for "exact" and "similar".
        num_steps_skipped: denoising steps that were not run for this picture.
        numerics_id: of the replica that continued the generation, where it differs from the one in `Accepted`.
    """

    disposition: str
    similarity: float = 0.0
    source: str = ""
    num_steps_skipped: int = 0
    numerics_id: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The generation has succeeded.

    Attributes:
        origins: where each picture came from, in the order of the outputs.
    """

    generation: str
    usage: pb.Usage
    timings: pb.Timings
    origins: tuple[Origin, ...] = ()


Event = Progress | Preview | Picture | Finished
Metadata = list[tuple[str, str]]
Call: TypeAlias = (
    "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]"
    " | grpc.aio.UnaryStreamCall[pb.WatchGenerationRequest, pb.WatchGenerationResponse]"
)


@dataclass(slots=True)
class _Received:
    """How far a generation was received, to resume from there.


    Attributes:
        at: index of the server that is asked.
        num_events: received on all connections.
        finished: the last event was received.
    """

    at: int
    name: str = ""
    num_events: int = 0
    finished: bool = False
    durable: bool = False
    sequence: int = 0
    seeds: list[int] = field(default_factory=list)
    parts: dict[int, bytearray] = field(default_factory=dict)


class Client:
    """A connection to a server, or to several replicas of one.

    Args:
        target: "host:port", or another form that gRPC takes. Several replicas: a list, or separated by commas. When
            one is lost, the client asks the next, which continues a generation that was accepted as REPLICATED.
        api_key: sent as a bearer token.
        credentials: for TLS; None: plain text.
        server_name: the name in the server's certificate, where it differs from the target's.
        patience_s: how long a generation whose connection is lost is asked for again, since its last event; and how
            long one that the tenant's quota refuses is, at the times that the server names.

    Raises:
        ValueError: "ARGUMENT: WHAT", for a target or an api_key that cannot be used.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
        patience_s: float = PATIENCE_S,
    ) -> None:
        targets = [one.strip() for one in (target.split(",") if isinstance(target, str) else target)]
        if not targets or not all(targets):
            raise ValueError("target: names no server")
        key = (api_key or "").rstrip()
        if not all("!" <= character <= "~" for character in key):
            raise ValueError("api_key: must be visible ASCII characters")
        self._targets = targets
        self._channels = [_channel(one, credentials, server_name) for one in targets]
        self._patience_s = patience_s
        self._at = 0
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection to the current server, for stubs of other services."""
        return self._channels[self._at]

    @property
    def generations(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        """The generated stub of GenerationService at the current server."""
        return self._generations(self._at)

    def _generations(self, at: int) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return generation_pb2_grpc.GenerationServiceStub(self._channels[at])

    @property
    def _caches(self) -> cache_pb2_grpc.CacheServiceAsyncStub:
        return cache_pb2_grpc.CacheServiceStub(self.channel)

    def _next(self, failed: int) -> int:
        """The server to ask after the one that failed.

        Generations that lose a server together step to the same next one: each steps from the server that it lost,
        and new calls follow the first of them only.
        """
        after = (failed + 1) % len(self._channels)
        if self._at == failed:
            self._at = after
        return after

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections."""
        for channel in self._channels:
            await channel.close()

    async def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        seed: int | None = None,
        seeds: list[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str = "",
        media_type: str = "image/png",
        preview: pb.PreviewPolicy | None = None,
        priority: pb.Priority.ValueType = pb.PRIORITY_UNSPECIFIED,
        labels: Mapping[str, str] | None = None,
        cache: CacheMode = "default",
        min_similarity: float | None = None,
        branch: pb.Branch | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Generates pictures. Yields progress, previews and finished pictures, then `Finished`.

        Args:
            timeout_s: deadline of the generation, across all connections; the server ends the generation then.
            cache: which cached results may be used. "default": those of an identical request; "bypass": none; "latent":
                also the latent of a similar prompt, to start from; "similar": also a finished picture for a prompt
                with the same meaning.
            min_similarity: least cosine similarity for "similar", above 0 and at most 1.
            branch: start from this step of an older generation; for one output, with the same model, size, number of
                steps and sampler.

        Raises:
            GenerationError: the request was refused, the generation failed, or it could not be resumed.
        """
        spec = pb.GenerationSpec(prompt=prompt, model=f"models/{model}" if model else "")
        if negative_prompt:
            spec.prompts.add(role=pb.Prompt.ROLE_NEGATIVE, text=negative_prompt)
        if steps is not None:
            spec.num_inference_steps = steps
        if guidance_scale is not None:
            spec.guidance_scale = guidance_scale
        if sampler:
            spec.sampler.name = sampler
        for value in seeds if seeds is not None else [] if seed is None else [seed]:
            spec.outputs.add(seed=value)
        request = pb.GenerateRequest(
            request_id=str(uuid.uuid4()),
            spec=spec,
            preview=preview,
            encoding=pb.PixelEncoding(media_type=media_type),
            scheduling=pb.Scheduling(priority=priority),
            labels=labels or {},
            cache=pb.CachePolicy(mode=CACHE_MODES[cache], min_similarity=min_similarity),
            branch=branch,
        )
        async with aclosing(self.develop(request, timeout_s=timeout_s)) as events:
            async for event in events:
                yield event

    async def develop(
        self, request: pb.GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Like `generate`, for a whole request message. Without a request_id it is never sent a second time."""
        metadata = list(self._metadata)
        with tracing.client_span(request, metadata):
            async with aclosing(self._develop(request, timeout_s, metadata)) as events:
                async for event in events:
                    yield event

    async def _develop(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> AsyncGenerator[Event, None]:
        received = _Received(self._at)
        loop = asyncio.get_running_loop()
        until = None if timeout_s is None else loop.time() + timeout_s
        tries, num_events = 0, 0
        began, first_patience_s = loop.time(), min(FIRST_PATIENCE_S, self._patience_s)
        give_up_at = began + first_patience_s
        while True:
            call = self._call(request, received, None if until is None else until - loop.time(), metadata)
            try:
                async for response in call:
                    for event in _events(response.event, received):
                        yield event
                if received.finished:
                    return
                failure = GenerationError.unfinished(received.name)
            except grpc.aio.AioRpcError as error:
                failure = GenerationError(error, proxies.proxy_of(self._targets[received.at]))
            finally:
                call.cancel()  # whoever looks away lets the server know; a call that has ended takes no notice
            if _is_over_quota(failure, request):
                wait_s = (failure.retry_after_s or 0.0) * random.uniform(1.0, 1.1)  # others were told the same time
                if loop.time() + wait_s > min(began + self._patience_s, math.inf if until is None else until):
                    raise failure from None
                await asyncio.sleep(wait_s)
                give_up_at = loop.time() + first_patience_s
                continue
            if received.num_events > num_events:
                tries, num_events, give_up_at = 0, received.num_events, loop.time() + self._patience_s
            wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2**tries) * random.uniform(0.5, 1.0)
            movable = len(self._channels) > 1 and (received.durable or not received.name)
            if not _is_resumable(failure, received, request, movable) or loop.time() + wait_s > give_up_at:
                raise failure from None
            if movable and failure.reason != "WATCHER_STALLED":
                received.at = self._next(received.at)
            tries += 1
            await asyncio.sleep(wait_s)

    def _call(
        self, request: pb.GenerateRequest, received: _Received, timeout_s: float | None, metadata: Metadata
    ) -> Call:
        generations = self._generations(received.at)
        if not received.name:
            return generations.Generate(request, timeout=timeout_s, metadata=metadata)
        watch = pb.WatchGenerationRequest(
            name=received.name,
            after_sequence=received.sequence,
            preview=request.preview if request.HasField("preview") else None,
            artifact_offsets=[
                pb.ArtifactOffset(output_index=index, offset=len(part)) for index, part in received.parts.items()
            ],
        )
        return generations.WatchGeneration(watch, timeout=timeout_s, metadata=metadata)

    async def models(self) -> list[models_pb2.Model]:
        """Returns all models of the server.

        Raises:
            GenerationError: the call was refused.
        """
        models: list[models_pb2.Model] = []
        token = ""
        while True:
            request = models_pb2.ListModelsRequest(page_token=token)
            try:
                stub = models_pb2_grpc.ModelServiceStub(self.channel)
                page = await stub.ListModels(request, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                raise GenerationError(error) from None
            models += page.models
            token = page.next_page_token
            if not token:
                return models

    async def cache_stats(self) -> cache_pb2.GetCacheStatsResponse:
        """Returns what the server's caches hold and have saved. For administrators.

        Raises:
            GenerationError: the call was refused.
        """
        try:
            return await self._caches.GetCacheStats(cache_pb2.GetCacheStatsRequest(), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise GenerationError(error) from None

    async def purge_cache(
        self, *, tenant: str = "", model_revision: str = "", generation: str = ""
    ) -> cache_pb2.PurgeCacheResponse:
        """Deletes the entries of the server's caches that match all given arguments. For administrators.

        Raises:
            GenerationError: the call was refused.
        """
        request = cache_pb2.PurgeCacheRequest(tenant=tenant, model_revision=model_revision, generation=generation)
        try:
            return await self._caches.PurgeCache(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise GenerationError(error) from None

    async def quotas(self) -> list[quotas_pb2.TenantQuota]:
        """Returns the quotas of all tenants and what is left of them. For administrators.

        Raises:
            GenerationError: the call was refused.
        """
        quotas: list[quotas_pb2.TenantQuota] = []
        token = ""
        while True:
            request = quotas_pb2.ListQuotasRequest(page_size=100, page_token=token)
            try:
                stub = quotas_pb2_grpc.QuotaServiceStub(self.channel)
                page = await stub.ListQuotas(request, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                raise GenerationError(error) from None
            quotas += page.quotas
            token = page.next_page_token
            if not token:
                return quotas


def _channel(target: str, credentials: grpc.ChannelCredentials | None, server_name: str) -> grpc.aio.Channel:
    options = [*CHANNEL_OPTIONS, *proxies.channel_options(target)]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options)
    named = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    return grpc.aio.secure_channel(target, credentials, [*options, *named])


def _is_resumable(failure: GenerationError, received: _Received, request: pb.GenerateRequest, movable: bool) -> bool:
    """Whether asking again can go on with the same generation; `movable`: another server can go on with it."""
    if failure.code is not grpc.StatusCode.UNAVAILABLE or not (received.name or request.request_id):
        return False
    return failure.reason in RESUMABLE or (movable and failure.reason in ELSEWHERE)


def _is_over_quota(failure: GenerationError, request: pb.GenerateRequest) -> bool:
    """Whether the request was refused, and the server has named the time after which it is not."""
    return failure.reason in OVER_QUOTA and failure.retry_after_s is not None and bool(request.request_id)


def _events(event: pb.GenerationEvent, received: _Received) -> list[Event]:
    received.name = event.generation
    received.num_events += 1
    received.finished = event.WhichOneof("event") == "finished"
    received.sequence = max(received.sequence, event.sequence)
    match event.WhichOneof("event"):
        case "accepted":
            received.seeds = [output.seed for output in event.accepted.spec.outputs]
            received.durable = event.accepted.durability == pb.Accepted.DURABILITY_REPLICATED
        case "progress":
            at = event.progress
            return [Progress(at.output_index, at.step, at.num_steps, at.batch_size)]
        case "preview":
            seen = event.preview
            return [Preview(seen.output_index, seen.step, seen.media_type, seen.width_px, seen.height_px, seen.data)]
        case "artifact_chunk":
            return _artifact(event.artifact_chunk, received)
        case "finished" if not event.finished.status.code:
            origins = tuple(_origin(result) for result in event.finished.cache_results)
            return [Finished(event.generation, event.finished.usage, event.finished.timings, origins)]
    return []


def _origin(result: pb.CacheResult) -> Origin:
    name = pb.CacheResult.Disposition.Name(result.disposition).removeprefix("DISPOSITION_").lower()
    return Origin(name, result.similarity, result.source, result.num_steps_skipped, result.numerics_id)


def _artifact(chunk: pb.ArtifactChunk, received: _Received) -> list[Event]:
    part = received.parts.setdefault(chunk.output_index, bytearray())
    if chunk.offset != len(part):
        return []
    part += chunk.data
    if len(part) < chunk.total_bytes or not chunk.sha256:
        return []
    if hashlib.sha256(part).digest() != chunk.sha256:
        raise ValueError(f"output {chunk.output_index} arrived damaged")
    seed = received.seeds[chunk.output_index]
    return [Picture(chunk.output_index, chunk.media_type, chunk.width_px, chunk.height_px, seed, bytes(part))]
