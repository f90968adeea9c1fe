"""Takes the calls of all services, holds each one until there is a replica, and forwards it to that replica as bytes.

A call has a known caller before it is held: whoever has no key wakes no machine. The replica checks the key again, and
everything else. Invariant: once a replica has begun to answer, the client gets exactly its answers and its status.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from safelight_server.activator.replicas import Replica
from safelight_server.activator.waiting_room import WaitingRoom
from safelight_server.api.identity import Identity
from safelight_server.api.service import (
    CACHE_SERVICE,
    GENERATION_SERVICE,
    IMAGE_SERVICE,
    MODEL_SERVICE,
    QUOTA_SERVICE,
)

SERVICES = (GENERATION_SERVICE, MODEL_SERVICE, IMAGE_SERVICE, CACHE_SERVICE, QUOTA_SERVICE)
KEPT_BYTES = 1 << 20
"""Bytes of the requests of a call that are kept until a replica answers. A call that sends more first, such as the
upload of a large picture, is not tried on another replica."""
DETAILS = "grpc-status-details-bin"
"""The one entry of gRPC's own that is forwarded: an error's details."""
OF_THE_CONNECTION = ("user-agent", "content-type", "te", "date", "accept-encoding", "traffic-class")

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Metadata: TypeAlias = "tuple[tuple[str, str | bytes], ...]"
Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"


class GrpcForwarder:
    """Forwards the calls of gRPC."""

    def __init__(self, room: WaitingRoom, identity: Identity) -> None:
        self._room = room
        self._identity = identity

    def handlers(self) -> dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]:
        """The handlers of all methods of the contract, by full name of the service and name of the method."""
        pool = descriptor_pool.Default()
        return {
            service: {
                method: self._handler(f"/{service}/{method}")
                for method in pool.FindServiceByName(service).methods_by_name
            }
            for service in SERVICES
        }

    def _handler(self, path: str) -> grpc.RpcMethodHandler[Any, Any]:
        """To gRPC every method has streams of bytes, which is the same on the wire."""

        async def forward(incoming: AsyncIterator[bytes], context: Context) -> AsyncGenerator[bytes, None]:
            metadata = context.invocation_metadata() or ()
            await self._identity.recognize(metadata, context.peer())
            replica: Replica | None = await self._room.replica()
            num_tries = 0
            with contextlib.closing(CallRequests(incoming)) as requests:
                while replica is not None:
                    num_tries += 1
                    with replica.call():
                        call: Call = replica.channel.stream_stream(path)(
                            metadata=_forwarded(metadata), timeout=context.time_remaining(), wait_for_ready=False
                        )
                        async with _sending(requests, call):
                            try:
                                while isinstance(answer := await call.read(), bytes):  # else grpc.aio.EOF
                                    requests.forget()
                                    yield answer
                                context.set_trailing_metadata(_forwarded(await call.trailing_metadata()))
                                return
                            except grpc.aio.AioRpcError as error:
                                failure = error
                    replica = await self._next(replica, failure) if requests.complete and num_tries == 1 else None
            await context.abort(failure.code(), failure.details() or "", _forwarded(failure.trailing_metadata() or ()))

        return grpc.stream_stream_rpc_method_handler(forward)

    async def _next(self, replica: Replica, failure: grpc.aio.AioRpcError) -> Replica | None:
        """The replica that a call is tried on after it has failed on another; None: it is not."""
        if failure.code() is not grpc.StatusCode.UNAVAILABLE:
            return None
        # A replica's own refusals have a reason, those of a broken connection have none.
        return await self._room.another(replica, gone=_reason(failure) in ("", "DRAINING"))


class CallRequests:
    """The requests of a call, which can be sent again from the first one on until they are forgotten.

    Attributes:
        complete: whether all that came so far can be sent again.
    """

    def __init__(self, incoming: AsyncIterator[bytes]) -> None:
        self.complete = True
        self._incoming = incoming
        self._kept: list[bytes] = []
        self._num_bytes = 0
        self._ended = False
        self._next: asyncio.Task[bytes | None] | None = None

    async def all(self) -> AsyncGenerator[bytes, None]:
        """The requests, from the first one on."""
        for request in self._kept:
            yield request
        while not self._ended:
            if self._next is None:
                self._next = asyncio.create_task(self._read())
            newest = await asyncio.shield(self._next)  # else a try that ends would end the source
            self._next = None
            if newest is None:
                self._ended = True
                return
            self._keep(newest)
            yield newest

    def forget(self) -> None:
        """Keeps no request from here on: a replica answers."""
        self.complete = False
        self._kept = []

    def close(self) -> None:
        """Stops waiting for the next request."""
        if self._next is not None:
            self._next.cancel()

    async def _read(self) -> bytes | None:
        async for request in self._incoming:
            return request
        return None

    def _keep(self, request: bytes) -> None:
        if self.complete:
            self._kept.append(request)
            self._num_bytes += len(request)
            if self._num_bytes > KEPT_BYTES:
                self.forget()


@asynccontextmanager
async def _sending(requests: CallRequests, call: Call) -> AsyncIterator[None]:
    """Sends the requests of a call on while the block reads the answers; at its end the call is cancelled."""

    async def send() -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # the replica has ended the call
            async with contextlib.aclosing(requests.all()) as each:
                async for request in each:
                    await call.write(request)
            await call.done_writing()

    sending = asyncio.create_task(send())
    sending.add_done_callback(lambda task: None if task.cancelled() or task.exception() is None else call.cancel())
    try:
        yield
    finally:
        call.cancel()
        sending.cancel()
        await asyncio.wait([sending])


def _forwarded(metadata: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """What of a call's metadata belongs to the call and not to its connection."""
    return tuple(
        (key, value)
        for key, value in metadata
        if key == DETAILS or not (key.startswith(("grpc-", ":")) or key in OF_THE_CONNECTION)
    )


def _reason(failure: grpc.aio.AioRpcError) -> str:
    """The reason in the details of an error; empty where it has none."""
    details = dict(failure.trailing_metadata() or ()).get(DETAILS)
    info = error_details_pb2.ErrorInfo()
    if isinstance(details, bytes):
        with contextlib.suppress(DecodeError):
            for packed in status_pb2.Status.FromString(details).details:
                if packed.Unpack(info):
                    return str(info.reason)
    return ""
