"""Makes connections to a replica: a gRPC channel and a pool of HTTP connections, with TLS and a client's certificate.

A channel is READY only while the replica's health service says SERVING: gRPC watches it. So a replica that drains gets
no new calls from the moment at which it says so. The files are read again when they change.
"""

from __future__ import annotations

import functools
import json
import socket
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path

import grpc
import httpx2
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from safelight_server.files import ConfigFileError, WatchedFile

CONNECT_S = 5.0
"""How long a connection to a replica may take."""
LOST_S = 30.0
"""After so long without an answer of its network, a replica counts as lost."""
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the server's answers are bounded by the server
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1e3)),  # how long a connection may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),  # a channel that is made anew connects anew, with the present certificate
    (
        "grpc.service_config",  # pick_first, the default, does not watch health
        json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}),
    ),
)
HTTP_IDLE_S = 60.0
"""How long an idle HTTP connection is kept; the replica would close it after 75 s."""
HTTP_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LOST_S * 1e3)),
)
"""A replica whose machine is gone ends its connections, although a stream may be silent for long."""


class Connector:
    """Makes the connections to replicas.

    Args:
        ca_file: PEM of who signed the replicas' certificate; None: they have no TLS.
        client_cert_file: PEM of a certificate and its key, for replicas with `tls_client_ca_file`. None: none.
        server_name: the name in the replicas' certificate; empty: their address.
        http_port: the replicas' port of HTTP.

    Raises:
        ConfigFileError: a file cannot be used.
    """

    def __init__(
        self,
        ca_file: Path | None = None,
        client_cert_file: Path | None = None,
        server_name: str = "",
        http_port: int = 0,
    ) -> None:
        if client_cert_file is not None and ca_file is None:
            raise ConfigFileError(f"{client_cert_file}: a client's certificate needs TLS, so the replicas' CA file too")
        self._server_name = server_name
        self._http_port = http_port
        self._client_cert_file = client_cert_file
        self._ca: WatchedFile[bytes] | None = None
        self._client: WatchedFile[bytes] | None = None
        if ca_file is not None:
            self._ca = WatchedFile(ca_file, functools.partial(_authorities, ca_file), "authorities")
        if client_cert_file is not None:
            check = functools.partial(_certificate_and_key, client_cert_file)
            self._client = WatchedFile(client_cert_file, check, "client_certificates")

    @property
    def works(self) -> list[Callable[[], Coroutine[None, None, None]]]:
        """Background work that reads the files again when they change."""
        return [file.follow for file in (self._ca, self._client) if file is not None]

    @property
    def certificates(self) -> tuple[bytes | None, bytes | None]:
        """The present content of both files. Connections that were made with another one are outdated."""
        ca = None if self._ca is None else self._ca.content
        return ca, None if self._client is None else self._client.content

    def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to a replica. `address` is HOST:PORT."""
        ca, client = self.certificates
        if ca is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        named = (("grpc.ssl_target_name_override", self._server_name),) if self._server_name else ()
        credentials = grpc.ssl_channel_credentials(ca, client, client)  # both are in the one file
        return grpc.aio.secure_channel(address, credentials, options=(*CHANNEL_OPTIONS, *named))

    def http(self) -> httpx2.AsyncHTTPTransport:
        """A pool of HTTP connections to one replica."""
        ca, _ = self.certificates
        context: ssl.SSLContext | bool = False
        if ca is not None:
            context = ssl.create_default_context(cadata=ca.decode("ascii"))
            if self._client_cert_file is not None:
                context.load_cert_chain(self._client_cert_file, password="")  # None would prompt on a terminal
        limits = httpx2.Limits(max_keepalive_connections=64, keepalive_expiry=HTTP_IDLE_S)
        return httpx2.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits, socket_options=HTTP_OPTIONS)

    def http_request(
        self, address: str, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> httpx2.Request:
        """A request to a replica.

        Args:
            address: HOST:PORT of its gRPC.
            target: path and query.
        """
        host = address.rpartition(":")[0].strip("[]")
        scheme = "http" if self._ca is None else "https"
        timeouts = {"connect": CONNECT_S, "write": LOST_S, "read": None, "pool": None}
        extensions: dict[str, object] = {"timeout": timeouts}
        if self._server_name:
            extensions["sni_hostname"] = self._server_name
        url = httpx2.URL(scheme=scheme, host=host, port=self._http_port, raw_path=target)
        return httpx2.Request(method, url, headers=headers, content=body, extensions=extensions)


def _authorities(file: Path, data: bytes) -> bytes:
    try:
        x509.load_pem_x509_certificates(data)
        data.decode("ascii")
    except ValueError:
        raise ConfigFileError(f"{file}: has no certificate in PEM") from None
    return data


def _certificate_and_key(file: Path, data: bytes) -> bytes:
    try:
        cert, key = x509.load_pem_x509_certificates(data)[0], load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        what = "must have a certificate and its key without a password, both in PEM"
        raise ConfigFileError(f"{file}: {what}") from None
    if key.public_key() != cert.public_key():
        raise ConfigFileError(f"{file}: the key is not that of the first certificate")
    return data
