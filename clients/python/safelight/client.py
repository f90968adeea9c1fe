"""The asyncio client: streams a generation as events, and resumes it when the connection is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, TypeAlias, Unpack

import grpc

from safelight import tracing
from safelight.errors import GenerationError
from safelight.events import Event
from safelight.images import ImageFile, image_file, upload, upload_missing
from safelight.received import Received
from safelight.request import GenerateOptions, PreviewOptions, generate_request, image_files, preview_policy
from safelight.servers import MAX_MESSAGE_BYTES, Servers, TokenSource
from safelight.stream import GenerationStream
from safelight.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    generation_pb2_grpc,
    images_pb2,
    models_pb2,
    models_pb2_grpc,
    quotas_pb2,
    quotas_pb2_grpc,
)
from safelight.v1 import generation_pb2 as pb

PATIENCE_S = 60.0
"""How long to try to resume a generation after its last event; longer than the restart of a server takes."""
FIRST_PATIENCE_S = 5.0
"""The same before the first event, so that a wrong target fails soon."""
FIRST_WAIT_S, MAX_WAIT_S = 0.1, 2.0
"""Wait between two tries: the first, doubled at each try up to the longest; times a random 0.5 to 1."""
RETRIES = 3
"""How often a request is sent again that was refused with RetryInfo."""
RESUMABLE = ("", "WATCHER_STALLED", "MOVED", "OTHER_MODEL")
"""Error reasons after which the same generation can be resumed; "" is a lost connection."""
DRAINING = "DRAINING"
"""The server takes no more: the next call is made by a new connection, which a balancer may give to another server."""
ELSEWHERE = (DRAINING, "UNAVAILABLE")
"""Error reasons after which the same call can succeed at another replica."""


Metadata = list[tuple[str, str]]
Call: TypeAlias = (
    "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]"
    " | grpc.aio.UnaryStreamCall[pb.WatchGenerationRequest, pb.WatchGenerationResponse]"
)


class Client:
    """A connection to a server, or to several replicas of it.

    Args:
        target: "host:port", or another form that gRPC supports. Several replicas: a list, or separated by commas. When
            a replica is lost, the next one continues a generation that was accepted as REPLICATED.
        api_key: sent as a bearer token.
        token: returns the access token of an OpenID provider, or awaits it; called anew for each call, also of a stream
            that is resumed, so it should return the same token until that is about to expire. A function that does not
            await runs in a thread. What it raises is raised by the call, and a call with a timeout_s waits for it until
            then (a thread runs on). Excludes api_key.
        credentials: for TLS; None: plain text.
        server_name: the name in the server's certificate, if it differs from the target's.
        patience_s: how long to try to resume a generation after its last event.
        retries: how often a request is sent again that the server has refused with RetryInfo. The client waits as long
            as that says, within patience_s and its deadline.
        max_message_bytes: the largest message that is accepted; a larger one is RESOURCE_EXHAUSTED.

    Raises:
        ValueError: "ARGUMENT: WHAT", for a target, an api_key or a token that cannot be used.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        api_key: str | None = None,
        token: TokenSource | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
        patience_s: float = PATIENCE_S,
        retries: int = RETRIES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        targets = [name.strip() for name in (target.split(",") if isinstance(target, str) else target)]
        self._servers = Servers(
            targets,
            api_key=api_key,
            token=token,
            credentials=credentials,
            server_name=server_name,
            max_message_bytes=max_message_bytes,
        )
        self._patience_s = patience_s
        self._retries = retries

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection to the current server, for stubs of other services; another one after a server has drained."""
        return self._servers.channel(self._servers.at)

    @property
    def generations(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        """The generated stub of GenerationService at the current server."""
        return self._generations(self._servers.at)

    def _generations(self, at: int) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return generation_pb2_grpc.GenerationServiceStub(self._servers.channel(at))

    @property
    def _quotas(self) -> quotas_pb2_grpc.QuotaServiceAsyncStub:
        return quotas_pb2_grpc.QuotaServiceStub(self.channel)

    @property
    def _caches(self) -> cache_pb2_grpc.CacheServiceAsyncStub:
        return cache_pb2_grpc.CacheServiceStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections."""
        await self._servers.close()

    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Generates pictures: an async iterator of `Accepted`, progress, previews and pictures, then `Finished`.

        Nothing is sent before it is iterated, or one of its shorthands is awaited, such as
        `await client.generate("a red potion").image()`.

        Args:
            options: see `GenerateOptions`.

        Raises:
            TypeError: there is no such argument.
            ValueError: two arguments exclude each other, or a value does not fit its field.
            GenerationError: while it is iterated: the request was refused, the generation failed, or it could not be
                resumed.
        """
        request, images = generate_request(prompt, **options), image_files(options)
        return GenerationStream(self.develop(request, timeout_s=options.get("timeout_s"), images=images))

    def watch(
        self, generation: str, *, timeout_s: float | None = None, **options: Unpack[PreviewOptions]
    ) -> GenerationStream:
        """Watches an existing generation from its first event on, such as on a second screen or after a restart.

        Args:
            generation: its name, "generations/ID".
            timeout_s: how long it is watched; the generation continues.
            options: which previews; see `PreviewOptions`.

        Raises:
            ValueError: `preview` is combined with other options.
            GenerationError: while it is iterated: there is no such generation, it failed, or it cannot be reached.
        """
        received = Received(self._servers.at, preview_policy(options), generation)
        return GenerationStream(self._develop(pb.GenerateRequest(), received, timeout_s, [], {}))

    async def develop(
        self,
        request: pb.GenerateRequest,
        *,
        timeout_s: float | None = None,
        images: Mapping[str, ImageFile] = MappingProxyType({}),
    ) -> AsyncGenerator[Event, None]:
        """Like `generate`, for a whole request message. Without a request_id it is never sent a second time.

        Args:
            images: files of pictures that the request names, by their names; uploaded if the server lacks them.
        """
        metadata: Metadata = []
        received = Received(self._servers.at, request.preview if request.HasField("preview") else None)
        with tracing.client_span(request, metadata):
            async with aclosing(self._develop(request, received, timeout_s, metadata, images)) as events:
                async for event in events:
                    yield event

    async def _develop(
        self,
        request: pb.GenerateRequest,
        received: Received,
        timeout_s: float | None,
        metadata: Metadata,
        images: Mapping[str, ImageFile],
    ) -> AsyncGenerator[Event, None]:
        loop = asyncio.get_running_loop()
        until = None if timeout_s is None else loop.time() + timeout_s
        tries, refusals, drains, num_events = 0, 0, 0, 0
        give_up_at = loop.time() + min(FIRST_PATIENCE_S, self._patience_s)
        while True:
            if images and not received.name:
                await self._upload_missing(images, received, until)
            headers = [*await self._servers.authorization(until), *metadata]
            channel = self._servers.channel(received.at)  # kept as long as the call: it may be given up meanwhile
            call = self._call(request, received, None if until is None else until - loop.time(), headers)
            try:
                async for response in call:
                    if (event := received.take(response.event)) is not None:
                        yield event
                if received.finished:
                    return
                failure = GenerationError.unfinished(received.name)
            except grpc.aio.AioRpcError as error:
                failure = self._servers.failure(error, received.at)
            finally:
                call.cancel()  # if the caller stops iterating, the server's stream must end; harmless after the end
            if received.num_events > num_events:
                tries, refusals, drains, num_events = 0, 0, 0, received.num_events
                give_up_at = loop.time() + self._patience_s
            goes_on_elsewhere = received.durable or not received.name
            movable = len(self._servers) > 1 and goes_on_elsewhere
            draining = failure.reason == DRAINING
            if draining:
                self._servers.give_up(received.at, channel)
                if not drains:
                    give_up_at = loop.time() + self._patience_s
                drains += 1
            if _is_resumable(failure, received, request, movable):
                wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2**tries) * random.uniform(0.5, 1.0)
                tries += 1
            elif draining and goes_on_elsewhere and (received.name or request.request_id):
                wait_s = (failure.retry_after_s or FIRST_WAIT_S) * random.uniform(1.0, 1.2)
            elif _is_refused_for_now(failure, received, request) and refusals < self._retries:
                if not refusals:
                    give_up_at = loop.time() + self._patience_s
                wait_s = (failure.retry_after_s or 0.0) * random.uniform(1.0, 1.2)  # not all at the same moment
                refusals += 1
            else:
                raise failure from None
            ends = min(give_up_at, until) if until is not None and failure.retry_after_s is not None else give_up_at
            if loop.time() + wait_s > ends:
                raise failure from None
            if movable and failure.reason != "WATCHER_STALLED":
                received.at = self._servers.move_on(received.at)
            await asyncio.sleep(wait_s)

    async def _upload_missing(self, images: Mapping[str, ImageFile], received: Received, until: float | None) -> None:
        """Uploads the files that the next server lacks; if it cannot be reached, moves on to the server after it.

        Args:
            until: the deadline, on the clock of the event loop.
        """
        loop = asyncio.get_running_loop()
        left, refusals = len(self._servers), 0
        give_up_at = loop.time() + self._patience_s
        ends = give_up_at if until is None else min(give_up_at, until)
        while True:
            file = None
            headers = await self._servers.authorization(until)
            try:
                for file in images.values():
                    timeout_s = None if until is None else until - loop.time()
                    await upload_missing(self._servers.channel(received.at), headers, file, timeout_s)
                return
            except grpc.aio.AioRpcError as error:
                failure = self._servers.failure(error, received.at)
            if failure.violations and file is not None:
                failure.violations = {file.field: "; ".join(failure.violations.values())}
            if (
                failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                and failure.retry_after_s
                and refusals < self._retries
            ):
                refusals += 1
                wait_s = failure.retry_after_s * random.uniform(1.0, 1.2)
                if loop.time() + wait_s > ends:
                    raise failure
                await asyncio.sleep(wait_s)
                continue
            left -= 1
            if failure.code is not grpc.StatusCode.UNAVAILABLE or not left:
                raise failure
            received.at = self._servers.move_on(received.at)

    async def upload_image(self, source: bytes | Path) -> images_pb2.Image:
        """Uploads a picture, PNG, JPEG or WebP. Its name can be given as `init_image` or `mask` from then on.

        Raises:
            ValueError: the file cannot be read.
            GenerationError: the server has refused it.
        """
        file = image_file(source, "source")
        if file is None:
            raise ValueError("source: must be bytes or a pathlib.Path")
        return await self._servers.ask(lambda metadata: upload(self.channel, metadata, file))

    def _call(
        self, request: pb.GenerateRequest, received: Received, timeout_s: float | None, metadata: Metadata
    ) -> Call:
        generations = self._generations(received.at)
        if not received.name:
            return generations.Generate(request, timeout=timeout_s, metadata=metadata)
        return generations.WatchGeneration(received.watch(), timeout=timeout_s, metadata=metadata)

    async def get(self, generation: str) -> pb.Generation:
        """Returns the state of a generation.

        Raises:
            GenerationError: the call was refused.
        """
        request = pb.GetGenerationRequest(name=generation)
        return (
            await self._servers.ask(lambda metadata: self.generations.GetGeneration(request, metadata=metadata))
        ).generation

    async def cancel(self, generation: str) -> pb.Generation:
        """Cancels a generation. Returns its final state, with the step that each output had reached.

        Raises:
            GenerationError: the call was refused.
        """
        request = pb.CancelGenerationRequest(name=generation)
        return (
            await self._servers.ask(lambda metadata: self.generations.CancelGeneration(request, metadata=metadata))
        ).generation

    async def models(self) -> list[models_pb2.Model]:
        """Returns all models of the server.

        Raises:
            GenerationError: the call was refused.
        """
        models: list[models_pb2.Model] = []
        request = models_pb2.ListModelsRequest()
        while True:
            page = await self._servers.ask(
                lambda metadata: models_pb2_grpc.ModelServiceStub(self.channel).ListModels(request, metadata=metadata)
            )
            models += page.models
            request.page_token = page.next_page_token
            if not request.page_token:
                return models

    async def unavailable_models(self) -> list[models_pb2.UnavailableModel]:
        """Returns the models that the server has and cannot serve, with the reasons.

        Raises:
            GenerationError: the call was refused.
        """
        request = models_pb2.ListModelsRequest(page_size=1)
        page = await self._servers.ask(
            lambda metadata: models_pb2_grpc.ModelServiceStub(self.channel).ListModels(request, metadata=metadata)
        )
        return list(page.unavailable)

    async def cache_stats(self) -> cache_pb2.GetCacheStatsResponse:
        """Returns what the server's caches hold and have saved. For administrators.

        Raises:
            GenerationError: the call was refused.
        """
        request = cache_pb2.GetCacheStatsRequest()
        return await self._servers.ask(lambda metadata: self._caches.GetCacheStats(request, metadata=metadata))

    async def purge_cache(
        self, *, tenant: str = "", model_revision: str = "", generation: str = ""
    ) -> cache_pb2.PurgeCacheResponse:
        """Deletes the entries of the server's caches that match all given arguments. For administrators.

        Raises:
            GenerationError: the call was refused.
        """
        request = cache_pb2.PurgeCacheRequest(tenant=tenant, model_revision=model_revision, generation=generation)
        return await self._servers.ask(lambda metadata: self._caches.PurgeCache(request, metadata=metadata))

    async def quotas(self) -> list[quotas_pb2.TenantQuota]:
        """Returns the quotas of all tenants and what is left of them. For administrators.

        Raises:
            GenerationError: the call was refused.
        """
        quotas: list[quotas_pb2.TenantQuota] = []
        request = quotas_pb2.ListQuotasRequest(page_size=100)
        while True:
            page = await self._servers.ask(lambda metadata: self._quotas.ListQuotas(request, metadata=metadata))
            quotas += page.quotas
            if not page.next_page_token:
                return quotas
            request.page_token = page.next_page_token


def _is_resumable(failure: GenerationError, received: Received, request: pb.GenerateRequest, movable: bool) -> bool:
    """Whether another call can resume the generation. `movable`: another server can continue it."""
    if failure.code is not grpc.StatusCode.UNAVAILABLE or not (received.name or request.request_id):
        return False
    return failure.reason in RESUMABLE or (movable and failure.reason in ELSEWHERE)


def _is_refused_for_now(failure: GenerationError, received: Received, request: pb.GenerateRequest) -> bool:
    """Whether the server has said when to retry, and a retry starts nothing twice."""
    if failure.retry_after_s is None or not (received.name or request.request_id):
        return False
    return failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED or not received.name
