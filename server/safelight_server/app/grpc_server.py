"""Makes the gRPC server: its options, its limits, and a request loop that survives every path.

In its request loop grpc.aio (1.85) decodes the path of a call as UTF-8, unless its method is registered. A path that is
not UTF-8, which anyone can send, ends that loop and with it the server. `_AnyPath` keeps paths away from the decoder;
decision record 0019 has the alternatives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import cast

import grpc
from grpc._cython import cygrpc
from grpc.aio._server import Server

from safelight_server.api.call_limits import CallLimits, Handler
from safelight_server.app.address import BindError, bind
from safelight_server.settings import Settings

UNKNOWN = b"/safelight/unknown"
"""The registered method that stands for all unknown methods."""
REQUEST_BYTES = 64 << 10
"""Bytes that a request may have in addition to its two prompts."""
MAX_KEYLESS_STREAMS = 1024
"""Bound on the open streams of health and reflection, which need no key: 20 MB, and far more than tools open."""
OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the port fails instead of taking half of the calls
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # a frozen peer is not seen by keepalive_timeout_ms alone
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", 10_000),  # ends a connection without a handshake; the default is 120 s
    ("grpc.max_concurrent_streams", 2048),  # per connection; clients queue further calls or open another connection
]


def make_server(
    settings: Settings,
    limits: CallLimits,
    services: Mapping[str, Mapping[str, Handler]],
    more_options: Sequence[tuple[str, int]] = (),
) -> grpc.aio.Server:
    """A gRPC server that is not started and has no address yet.

    Args:
        limits: wraps every call.
        services: the handlers, by full name of the service and name of the method.
        more_options: of gRPC, beside `OPTIONS`.
    """
    largest = REQUEST_BYTES + 2 * 4 * settings.max_prompt_chars  # two prompts, at most four UTF-8 bytes a character
    options = [
        *OPTIONS,
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        *more_options,
    ]
    server = cast(grpc.aio.Server, _Server(options))
    for service, handlers in services.items():
        limited = {method: limits.limited(service, handler) for method, handler in handlers.items()}
        server.add_registered_method_handlers(service, limited)
    server.add_generic_rpc_handlers((_AnyMethod(limits.unknown()),))
    return server


def probe_server(
    settings: Settings, limits: CallLimits, health: Mapping[str, Mapping[str, Handler]]
) -> grpc.aio.Server | None:
    """The server of `probe_port`, bound and not started; None if that is off.

    It has only the health service, and no TLS, which the gRPC probes of Kubernetes do not support.

    Raises:
        BindError: the address is in use or not this machine's.
    """
    if not settings.probe_port:
        return None
    server = make_server(settings, limits, health)
    try:
        bind(server, settings.host, settings.probe_port, None)
    except BindError as error:
        raise BindError(f"probe_port: {error}") from None
    return server


class _Server(Server):
    def __init__(self, options: Sequence[tuple[str, int]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = _AnyPath(self._loop, None, (), (), tuple(options), None)
        self._server.add_registered_method_handlers({UNKNOWN.decode(): None})


class _AnyPath(cygrpc.AioServer):  # type: ignore[misc]  # grpc's own has no types
    """A server of registered methods that handles calls of any other path as calls of the method `UNKNOWN`.

    The request loop has one future for each registered method, whose name it knows, and one for all other paths, which
    it decodes. This class swaps the future of `UNKNOWN` and that of all other paths, so that no path is decoded. (A
    call of the path of `UNKNOWN` itself then has an empty name.)
    """

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[object]:
        if method is None:
            method = UNKNOWN
        elif method == UNKNOWN:
            method = None
        future: asyncio.Future[object] = super()._make_request_call_future(method)
        return future


class _AnyMethod(grpc.GenericRpcHandler):
    """Returns one handler for `UNKNOWN` and for every method that is not registered."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def service(self, _call: grpc.HandlerCallDetails) -> Handler:
        return self._handler
