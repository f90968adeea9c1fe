"""The servers of a client: a connection to each, which one is current, and by what they recognize the caller."""

from __future__ import annotations

import asyncio
import functools
import inspect
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar

import grpc

from safelight import proxies
from safelight.errors import GenerationError
from safelight.images import Metadata

CHANNEL_OPTIONS = [
    ("grpc.http2.bdp_probe", 0),  # with the next: previews wait at the server, where the newest wins, and not here
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.keepalive_time_ms", 10_000),  # while a stream is open: a server that is frozen is seen within 15 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # a frozen peer is not seen by keepalive_timeout_ms alone
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # also how long a server may take to answer a new connection
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, not that of another channel
]
MAX_MESSAGE_BYTES = 4 << 20
"""Larger than every message of a server; gRPC's own default."""
Answer = TypeVar("Answer")
TokenSource: TypeAlias = Callable[[], str | Awaitable[str]]
"""Returns an access token, or awaits it."""


class Servers:
    """A connection to each replica of a server. Calls are made at the current one, until it fails.

    Args:
        targets: as gRPC takes them, at least one.
        api_key: see `Client`.
        token: see `Client`.

    Attributes:
        at: index of the current server, which takes new calls.

    Raises:
        ValueError: "ARGUMENT: WHAT", as `Client`.
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        api_key: str | None,
        token: TokenSource | None,
        credentials: grpc.ChannelCredentials | None,
        server_name: str,
        max_message_bytes: int,
    ) -> None:
        if not targets or not all(targets):
            raise ValueError("target: names no server")
        key = (api_key or "").rstrip()
        if key and token is not None:
            raise ValueError("token: excludes api_key")
        self.at = 0
        self._metadata = _bearer("api_key", key) if key else ()
        self._token = token
        self._targets = targets
        self._connect = functools.partial(
            _channel, credentials=credentials, server_name=server_name, max_message_bytes=max_message_bytes
        )
        self._channels = [self._connect(name) for name in targets]
        self._given_up: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self._channels)

    def channel(self, at: int) -> grpc.aio.Channel:
        """The connection for new calls at a server."""
        return self._channels[at]

    def failure(self, error: grpc.aio.AioRpcError, at: int) -> GenerationError:
        """The error that a failed call at a server raises for the caller."""
        return GenerationError(error, proxies.proxy_of(self._targets[at]))

    def move_on(self, failed: int) -> int:
        """The index of the server to use after server number `failed`.

        Generations that lose a server at the same time move to the same next server: each moves on from the server that
        it lost, and only the first of them changes the server for new calls.
        """
        after = (failed + 1) % len(self._channels)
        if self.at == failed:
            self.at = after
        return after

    def give_up(self, at: int, channel: grpc.aio.Channel) -> None:
        """Makes new calls at a server use a new connection; streams that are open stay on the old one.

        Generations that are refused together give up the same connection: only the first of them replaces it.
        """
        if self._channels[at] is channel:
            self._given_up.add(channel)
            self._channels[at] = self._connect(self._targets[at])

    async def close(self) -> None:
        """Closes all connections."""
        for channel in [*self._channels, *self._given_up]:
            await channel.close()

    async def authorization(self, until: float | None = None) -> Metadata:
        """The metadata by which the server recognizes the caller.

        Args:
            until: the call's deadline, on the clock of the event loop.

        Raises:
            GenerationError: DEADLINE_EXCEEDED, while the token was waited for.
        """
        if self._token is None:
            return self._metadata
        try:
            async with asyncio.timeout_at(until) as deadline:
                token: str | Awaitable[str]
                if inspect.iscoroutinefunction(self._token):
                    token = self._token()
                else:
                    # It may fetch one, which the streams must not wait for.
                    token = await asyncio.to_thread(self._token)
                if inspect.isawaitable(token):
                    token = await token
        except TimeoutError:
            if deadline.expired():
                raise GenerationError.late("the token was not there in time") from None
            raise  # the source's own
        return _bearer("token", token.rstrip())

    async def ask(self, call: Callable[[Metadata], Awaitable[Answer]]) -> Answer:
        """Makes a call at the current server; if it cannot be reached, at the next servers in turn.

        Raises:
            GenerationError: the call was refused, or no server can be reached.
        """
        for left in reversed(range(len(self._channels))):
            metadata = await self.authorization()  # first: the current server may change meanwhile
            server = self.at
            try:
                return await call(metadata)
            except grpc.aio.AioRpcError as error:
                failure = self.failure(error, server)
            if failure.code is not grpc.StatusCode.UNAVAILABLE or not left:
                raise failure from None
            self.move_on(server)
        raise AssertionError("there is always a server")


def _bearer(argument: str, secret: str) -> Metadata:
    if not secret or not all("!" <= character <= "~" for character in secret):
        raise ValueError(f"{argument}: must be visible ASCII characters")
    return (("authorization", f"Bearer {secret}"),)


def _channel(
    target: str, credentials: grpc.ChannelCredentials | None, server_name: str, max_message_bytes: int
) -> grpc.aio.Channel:
    longest = ("grpc.max_receive_message_length", max_message_bytes)
    options = [*CHANNEL_OPTIONS, longest, *proxies.channel_options(target)]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options)
    named = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    return grpc.aio.secure_channel(target, credentials, [*options, *named])
