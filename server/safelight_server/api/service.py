"""The gRPC services of the contract, one method for each call.

A method gets the parsed request and its caller, and returns the answer or the
stream of it. `_stream_handler` and `_unary_handler` wrap the methods: they recognize the caller, parse,
and turn errors into statuses, before the first event and in mid-stream alike.
Events come serialized from `stream/` and are sent as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeAlias, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from safelight.v1 import cache_pb2, images_pb2, models_pb2, quotas_pb2
from safelight.v1 import generation_pb2 as pb

from safelight_server import wire
from safelight_server.api.identity import Identity
from safelight_server.api.images import ImageCalls
from safelight_server.api.paging import page
from safelight_server.api.quota import StreamQuota
from safelight_server.cache.admin import CacheAdmin
from safelight_server.catalog.catalog import Catalog
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    GenerationCancelledError,
    InternalError,
    InvalidRequestError,
    SafelightError,
)
from safelight_server.domain.request import PreviewPolicy
from safelight_server.generations.generation import Generation
from safelight_server.generations.registry import Generations
from safelight_server.quotas.quotas import Quotas
from safelight_server.runtime.base import Runtime
from safelight_server.stream import Watcher
from safelight_server.telemetry import Metrics, Stage, Tracing
from safelight_server.validation import (
    RequestLimits,
    find_model,
    resolve_name,
    resolve_preview,
    resolve_priority,
    resolve_purge,
    resolve_request,
)

log = structlog.get_logger(__name__)

GENERATION_SERVICE = "safelight.v1.GenerationService"
MODEL_SERVICE = "safelight.v1.ModelService"
CACHE_SERVICE = "safelight.v1.CacheService"
QUOTA_SERVICE = "safelight.v1.QuotaService"
IMAGE_SERVICE = "safelight.v1.ImageService"

Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
In = TypeVar("In", bound=Message)
Out = TypeVar("Out", bound=Message)


class Service:
    """All services of the contract.

    Args:
        limits: the server's limits on requests, in addition to those of the models.
        streams: bounds the streams of each caller.
        quotas: bounds the requests and the compute of each tenant.
    """

    def __init__(
        self,
        identity: Identity,
        catalog: Catalog,
        runtime: Runtime,
        generations: Generations,
        caches: CacheAdmin,
        limits: RequestLimits,
        streams: StreamQuota,
        quotas: Quotas,
        images: ImageCalls,
        metrics: Metrics,
        tracer: Tracing,
    ) -> None:
        self._identity = identity
        self._catalog = catalog
        self._runtime = runtime
        self._generations = generations
        self._caches = caches
        self._limits = limits
        self._streams = streams
        self._quotas = quotas
        self._images = images
        self._metrics = metrics
        self._tracer = tracer

    def handlers(self) -> dict[str, dict[str, Handler]]:
        """The handlers of all methods, by full name of the service and name of the method."""
        stream, unary = self._stream_handler, self._unary_handler
        return {
            GENERATION_SERVICE: {
                "Generate": stream("Generate", self.generate, pb.GenerateRequest),
                "WatchGeneration": stream("WatchGeneration", self.watch_generation, pb.WatchGenerationRequest),
                "UpdateGeneration": unary("UpdateGeneration", self.update_generation, pb.UpdateGenerationRequest),
                "CancelGeneration": unary("CancelGeneration", self.cancel_generation, pb.CancelGenerationRequest),
                "GetGeneration": unary("GetGeneration", self.get_generation, pb.GetGenerationRequest),
            },
            MODEL_SERVICE: {
                "ListModels": unary("ListModels", self.list_models, models_pb2.ListModelsRequest),
                "GetModel": unary("GetModel", self.get_model, models_pb2.GetModelRequest),
            },
            CACHE_SERVICE: {
                "GetCacheStats": unary("GetCacheStats", self.get_cache_stats, cache_pb2.GetCacheStatsRequest),
                "PurgeCache": unary("PurgeCache", self.purge_cache, cache_pb2.PurgeCacheRequest),
            },
            IMAGE_SERVICE: {
                "UploadImage": self._upload_handler(),
                "GetImage": unary("GetImage", self._images.get_image, images_pb2.GetImageRequest),
            },
            QUOTA_SERVICE: {"ListQuotas": unary("ListQuotas", self.list_quotas, quotas_pb2.ListQuotasRequest)},
        }

    async def generate(self, request: pb.GenerateRequest, caller: Caller, stream: _Stream) -> Watcher:
        """Starts a generation (or finds the one with this request id) and opens a stream of its events."""
        if not self._generations.knows(caller, request.request_id):  # a known id is a repeated request
            await self._quotas.admit(caller.tenant)
        with stream.stage.within("resolve"):
            resolved = resolve_request(request, self._catalog, self._limits, caller.tenant)
        generation = await self._generations.start(caller, resolved, stream.stage, stream.time_left_s)
        return self._open(generation, resolved.preview, stream)

    async def watch_generation(self, request: pb.WatchGenerationRequest, caller: Caller, stream: _Stream) -> Watcher:
        """Opens a stream of the events of an existing generation, from where the client left off."""
        generation = await self._generations.find(caller, resolve_name(request.name, "generations"))
        pipeline = self._generations.pipeline_of(generation)
        policy = resolve_preview(request.preview, pipeline)
        offsets = {offset.output_index: offset.offset for offset in request.artifact_offsets}
        return self._open(generation, policy, stream, request.after_sequence, offsets)

    def _open(
        self,
        generation: Generation,
        policy: PreviewPolicy,
        stream: _Stream,
        after_sequence: int = 0,
        offsets: dict[int, int] | None = None,
    ) -> Watcher:
        structlog.contextvars.bind_contextvars(generation=generation.name)
        stream.watches(generation)
        stream.watcher = self._generations.attach(generation, policy, stream.end, after_sequence, offsets)
        return stream.watcher

    async def update_generation(
        self, request: pb.UpdateGenerationRequest, caller: Caller
    ) -> pb.UpdateGenerationResponse:
        """Changes the previews or the priority of a generation. An update with a faulty field changes nothing."""
        generation = await self._generations.find(caller, resolve_name(request.name, "generations"))
        if generation.ended:
            raise FailedPreconditionError(f"{generation.name} has ended")
        policy = priority = None
        if request.HasField("preview"):
            policy = resolve_preview(request.preview, self._generations.pipeline_of(generation))
        if request.HasField("scheduling"):
            priority = resolve_priority(request.scheduling)
        if policy is not None:  # after all checks, so that a faulty update changes nothing
            generation.log.update_policy(generation.preview_policy(policy))
        if priority is not None:
            self._generations.set_priority(generation, priority)
        return pb.UpdateGenerationResponse(generation=wire.generation_message(generation.view()))

    async def cancel_generation(
        self, request: pb.CancelGenerationRequest, caller: Caller
    ) -> pb.CancelGenerationResponse:
        """Cancels a generation and returns it."""
        generation = await self._generations.find(caller, resolve_name(request.name, "generations"))
        await self._generations.cancel(generation)
        return pb.CancelGenerationResponse(generation=wire.generation_message(generation.view()))

    async def get_generation(self, request: pb.GetGenerationRequest, caller: Caller) -> pb.GetGenerationResponse:
        """Returns the state of a generation."""
        generation = await self._generations.find(caller, resolve_name(request.name, "generations"), tend=False)
        return pb.GetGenerationResponse(generation=wire.generation_message(generation.view()))

    async def list_models(self, request: models_pb2.ListModelsRequest, caller: Caller) -> models_pb2.ListModelsResponse:
        """Returns a page of the models, in the order of their names."""
        names, following = page(list(self._catalog.pipelines), request.page_size, request.page_token)
        unavailable = [] if request.page_token else self._catalog.unavailable.values()
        return models_pb2.ListModelsResponse(
            models=[self._model(name, caller) for name in names],
            next_page_token=following,
            unavailable=[wire.unavailable_model(at) for at in unavailable],
        )

    async def get_model(self, request: models_pb2.GetModelRequest, caller: Caller) -> models_pb2.GetModelResponse:
        """Returns a model."""
        if not request.name:
            raise InvalidRequestError([FieldViolation("name", "must be models/ID")])
        name = find_model(request.name, self._catalog, "name").name
        return models_pb2.GetModelResponse(model=self._model(name, caller))

    def _model(self, name: str, caller: Caller) -> models_pb2.Model:
        adapters = self._catalog.adapters.of(name, caller.tenant).values()
        return wire.model_message(self._catalog.get(name), self._runtime, name == self._catalog.default, adapters)

    async def get_cache_stats(
        self, _request: cache_pb2.GetCacheStatsRequest, caller: Caller
    ) -> cache_pb2.GetCacheStatsResponse:
        """Returns the statistics of the caches. For administrators."""
        caller.check_admin()
        return wire.stats_message(await self._caches.stats())

    async def purge_cache(self, request: cache_pb2.PurgeCacheRequest, caller: Caller) -> cache_pb2.PurgeCacheResponse:
        """Deletes entries from the caches. For administrators."""
        caller.check_admin()
        return wire.purged_message(await self._caches.purge(resolve_purge(request)))

    async def list_quotas(self, request: quotas_pb2.ListQuotasRequest, caller: Caller) -> quotas_pb2.ListQuotasResponse:
        """Returns a page of the tenants with their quotas. For administrators."""
        caller.check_admin()
        tenants = sorted({*self._identity.tenants, *self._quotas.tenants})
        names, following = page(tenants, request.page_size, request.page_token)
        return wire.quotas_message(await self._quotas.views(names), following)

    def _stream_handler(
        self,
        name: str,
        method: Callable[[In, Caller, _Stream], Awaitable[Watcher]],
        request_type: type[In],
    ) -> Handler:
        service = _service_of(request_type)

        async def handler(data: bytes, context: Context) -> AsyncGenerator[bytes, None]:
            # holds no generation: a client that does not read would keep its pictures
            metadata = context.invocation_metadata() or ()
            caller = await self._recognize(metadata, context.peer())
            known = isinstance(caller, Caller)
            stage = self._tracer.server_call(service, name, metadata, known=known)
            stage.enter()
            stream = _Stream(context, stage)
            failure: SafelightError | None = None
            try:
                if isinstance(caller, SafelightError):
                    raise caller
                with self._streams.stream(caller):
                    watcher = await method(_parse(request_type, data), caller, stream)
                    try:
                        async with aclosing(watcher.events()) as events:
                            async for event in events:
                                stream.waiting_bytes = len(event)
                                with stage.within("write"):
                                    yield event
                                stream.waiting_bytes = 0
                    finally:
                        error = self._generations.detach(watcher)
                    if error is not None:
                        raise error
            except SafelightError as raised:
                failure = raised.with_traceback(None)  # a traceback would keep the frames of this call
            except (asyncio.CancelledError, GeneratorExit):
                stream.end_span_given_up()
                raise
            except Exception:  # the one mapping of bugs to a status
                log.exception("bug", rpc=name)
                failure = InternalError()
            _end_span(stage, failure or stream.failure)
            if stream.ending is not None:
                await stream.ending  # returning before the abort would end the call as OK
            elif failure is not None:
                await self._abort(context, failure, caller, started=stream.watcher is not None)

        return grpc.unary_stream_rpc_method_handler(handler)

    def _unary_handler(
        self, name: str, method: Callable[[In, Caller], Awaitable[Out]], request_type: type[In]
    ) -> Handler:
        async def handler(data: bytes, context: Context) -> bytes:
            return await self._answer(
                name, request_type, context, lambda caller: method(_parse(request_type, data), caller)
            )

        return grpc.unary_unary_rpc_method_handler(handler)

    def _upload_handler(self) -> Handler:
        name, request_type = "UploadImage", images_pb2.UploadImageRequest

        async def handler(pieces: AsyncIterator[bytes], context: Context) -> bytes:
            parsed = (_parse(request_type, data) async for data in pieces)
            return await self._answer(
                name, request_type, context, lambda caller: self._images.upload_image(parsed, caller)
            )

        return grpc.stream_unary_rpc_method_handler(handler)

    async def _answer(
        self, name: str, request_type: type[Message], context: Context, method: Callable[[Caller], Awaitable[Out]]
    ) -> bytes:
        """Runs a unary method in a span of its own."""
        metadata = context.invocation_metadata() or ()
        caller = await self._recognize(metadata, context.peer())
        known = isinstance(caller, Caller)
        stage = self._tracer.server_call(_service_of(request_type), name, metadata, known=known)
        stage.enter()
        try:
            if isinstance(caller, SafelightError):
                raise caller
            result = await method(caller)
        except SafelightError as error:
            _end_span(stage, error)
            await self._abort(context, error, caller)
            raise AssertionError from error
        except asyncio.CancelledError:
            _end_span(stage, GenerationCancelledError("the call was given up"))
            raise
        except Exception:  # the one mapping of bugs to a status
            log.exception("bug", rpc=name)
            _end_span(stage, InternalError())
            await self._abort(context, InternalError(), caller)
            raise
        _end_span(stage, None)
        return result.SerializeToString()

    async def _recognize(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Caller | SafelightError:
        """The caller, or the error that refuses it. Called before the span begins: only known callers may force one."""
        try:
            return await self._identity.recognize(metadata, peer)
        except SafelightError as error:
            return error.with_traceback(None)

    async def _abort(
        self, context: Context, error: SafelightError, caller: object = None, *, started: bool = False
    ) -> None:
        if not started:
            self._metrics.refused(error.reason, caller.tenant if isinstance(caller, Caller) else None)
            log.info("refused", reason=error.reason, message=error.message)
        try:
            await context.abort(error.status, error.message, wire.trailing_metadata(error))
        except grpc.aio.InternalError:  # the client has left: a deadline, for one, ends the call at both ends
            raise asyncio.CancelledError from None


class _Stream:
    """The state of a streaming call: its connection, its trace span, and how it is ended from outside.

    Attributes:
        waiting_bytes: size of the message that was handed to gRPC and that the client has not read.
    """

    def __init__(self, context: Context, stage: Stage) -> None:
        self._context = context
        self.ending: asyncio.Task[None] | None = None
        self.stage = stage
        self.failure: SafelightError | None = None
        self.watcher: Watcher | None = None
        self.waiting_bytes = 0
        self._generation = ""
        self.time_left_s: float | None = context.time_remaining()

    def watches(self, generation: Generation) -> None:
        """Describes the generation in the span of this call, and links the span of the call that started it."""
        self._generation, spec = generation.name, generation.request.spec
        if not self.stage.recorded:
            return
        self.stage.note(
            {
                "safelight.generation": generation.name,
                "safelight.model": spec.model,
                "safelight.steps": spec.num_inference_steps,
                "safelight.outputs": len(generation.outputs),
                "safelight.priority": generation.priority.name.lower(),
            }
        )
        if generation.stage is not self.stage:
            self.stage.link(generation.stage)

    def end(self, error: SafelightError) -> None:
        """Ends the call with an error, from outside of its handler.

        A client that does not read gets the status after the events that are buffered for it.
        """
        log.info(
            "stream_ended",
            reason=error.reason,
            generation=self._generation,
            client=self._context.peer(),
            waiting_bytes=self.waiting_bytes,
        )
        self.failure = error
        self.ending = asyncio.create_task(self._abort(error))

    def end_span_given_up(self) -> None:
        """Ends the span of a call whose client has left or whose deadline has passed."""
        left_s = self._context.time_remaining()
        late = left_s is not None and left_s <= 0
        gone = DeadlineExceededError("the deadline passed") if late else GenerationCancelledError("the client has gone")
        _end_span(self.stage, self.failure or gone)

    async def _abort(self, error: SafelightError) -> None:
        with contextlib.suppress(grpc.aio.BaseError, asyncio.CancelledError):  # the connection may break meanwhile
            await self._context.abort(error.status, error.message, wire.trailing_metadata(error))


def _end_span(stage: Stage, error: SafelightError | None) -> None:
    if not stage.recorded:
        return
    status = grpc.StatusCode.OK if error is None else error.status
    stage.end_call(status.name, int(status.value[0]), "" if error is None else error.reason)


def _service_of(request_type: type[Message]) -> str:
    [service] = request_type.DESCRIPTOR.file.services_by_name.values()
    return str(service.full_name)


def _parse(request_type: type[In], data: bytes) -> In:
    try:
        return request_type.FromString(data)
    except DecodeError:
        what = f"is no {request_type.DESCRIPTOR.full_name}: it is malformed, or a string is not UTF-8"
        raise InvalidRequestError([FieldViolation("request", what)]) from None
