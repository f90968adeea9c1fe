"""Takes the calls of all services, holds each one until there is a replica, and forwards it to that replica as bytes.

A call has a known caller before it is held: whoever has no key wakes no machine. The replica checks the key again, and
everything else. Invariant: once a call is forwarded, the client gets exactly the replica's answers and its status.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool
from prometheus_client import CollectorRegistry, Gauge

from safelight_server.activator.fleet import LOOK_EVERY_S, Fleet
from safelight_server.api.identity import Identity
from safelight_server.api.service import (
    CACHE_SERVICE,
    GENERATION_SERVICE,
    IMAGE_SERVICE,
    MODEL_SERVICE,
    QUOTA_SERVICE,
)
from safelight_server.domain.errors import QueueFullError, UnavailableError

SERVICES = (GENERATION_SERVICE, MODEL_SERVICE, IMAGE_SERVICE, CACHE_SERVICE, QUOTA_SERVICE)
RETRY_S = 5.0
CONNECT_S = 5.0
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the server's answers are bounded by the server
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
DETAILS = "grpc-status-details-bin"
"""The one entry of gRPC's own that is forwarded: an error's details."""
OF_THE_CONNECTION = ("user-agent", "content-type", "te", "date", "accept-encoding", "traffic-class")

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Metadata: TypeAlias = "tuple[tuple[str, str | bytes], ...]"
Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"


def connector(ca: bytes | None, server_name: str = "") -> Callable[[str], grpc.aio.Channel]:
    """Makes channels to replicas.

    Args:
        ca: PEM of who signed the replicas' certificate; None: they have no TLS.
        server_name: in their certificate.
    """
    if ca is None:
        return lambda address: grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(ca)  # one object: gRPC shares the connections of such channels
    named = (("grpc.ssl_target_name_override", server_name),) if server_name else ()
    return lambda address: grpc.aio.secure_channel(address, credentials, options=(*CHANNEL_OPTIONS, *named))


class Activator:
    """Holds and forwards calls.

    Args:
        connect: makes a channel to an address.
        max_held: calls that are held at once; more are refused.
        hold_s: seconds that a call is held.
        connect_s: seconds that a connection to a replica may take.
        registry: gets the metric of held calls.
    """

    def __init__(
        self,
        fleet: Fleet,
        identity: Identity,
        connect: Callable[[str], grpc.aio.Channel],
        *,
        max_held: int,
        hold_s: float,
        connect_s: float = CONNECT_S,
        registry: CollectorRegistry,
    ) -> None:
        self._fleet = fleet
        self._identity = identity
        self._connect = connect
        self._max_held = max_held
        self._hold_s = hold_s
        self._connect_s = connect_s
        self._held = 0
        self._draining = asyncio.Event()
        gauge = Gauge("safelight_held_calls", "Calls that wait for the first replica of a fleet.", registry=registry)
        gauge.set_function(lambda: self._held)

    @property
    def num_held(self) -> int:
        """Calls that wait for a replica."""
        return self._held

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

    def drain(self) -> None:
        """Refuses the calls that are held, and those that would be."""
        self._draining.set()

    def _handler(self, path: str) -> grpc.RpcMethodHandler[Any, Any]:
        """To gRPC every method has streams of bytes, which is the same on the wire."""

        async def forward(requests: AsyncIterator[bytes], context: Context) -> AsyncGenerator[bytes, None]:
            metadata = context.invocation_metadata() or ()
            self._identity.recognize(metadata, context.peer())
            async with self._replica() as channel:
                call: Call = channel.stream_stream(path)(
                    metadata=_forwarded(metadata), timeout=context.time_remaining(), wait_for_ready=False
                )
                async with _sending(requests, call):
                    try:
                        while isinstance(answer := await call.read(), bytes):  # else grpc.aio.EOF
                            yield answer
                    except grpc.aio.AioRpcError as error:
                        told = _forwarded(error.trailing_metadata() or ())
                        await context.abort(error.code(), error.details() or "", told)
                    context.set_trailing_metadata(_forwarded(await call.trailing_metadata()))

        return grpc.stream_stream_rpc_method_handler(forward)

    @asynccontextmanager
    async def _replica(self) -> AsyncIterator[grpc.aio.Channel]:
        """A connection to a replica while the block runs; until there is one the call is held.

        Raises:
            QueueFullError: as many calls are held as may be.
            UnavailableError: there was none in time, or the activator ends.
        """
        channel = await self._connected() or await self._first_connection()
        try:
            yield channel
        finally:
            await channel.close()

    async def _connected(self) -> grpc.aio.Channel | None:
        """A connection to some replica; None if there is none, or if it does not answer, as DNS may lag."""
        if (address := self._fleet.some_address()) is None:
            return None
        channel = self._connect(address)
        try:
            async with asyncio.timeout(self._connect_s):
                await channel.channel_ready()
        except TimeoutError:
            await channel.close()
            return None
        except BaseException:
            await channel.close()
            raise
        return channel

    async def _first_connection(self) -> grpc.aio.Channel:
        if self._held >= self._max_held:
            raise QueueFullError(
                f"{self._max_held} calls wait for a replica to start, as many as may",
                reason="TOO_MANY_CALLS",
                retry_after_s=RETRY_S,
            )
        self._held += 1
        try:
            async with asyncio.timeout(self._hold_s):
                while not self._draining.is_set():
                    if channel := await self._connected():
                        return channel
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._draining.wait(), LOOK_EVERY_S / 2)
        except TimeoutError:
            raise UnavailableError(
                f"no replica has started within {self._hold_s:g} s",
                reason="RUNTIME_UNAVAILABLE",
                retry_after_s=RETRY_S,
            ) from None
        finally:
            self._held -= 1
        raise UnavailableError("the server is draining; ask another", reason="DRAINING")


@asynccontextmanager
async def _sending(requests: AsyncIterator[bytes], call: Call) -> AsyncIterator[None]:
    """Sends the requests of a call on while the block reads the answers; at its end the call is cancelled."""

    async def send() -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # the replica has ended the call
            async for request in requests:
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
