"""The server's TLS certificate, for gRPC and for HTTP, which is read again when its files change.

It is asked for before each handshake. The two files are small, so they are read and compared each time: beside a
handshake that costs nothing. A new pair that cannot be used, such as one of which only one file has been written yet,
is logged once, and the pair in force stays. Connections that are open keep the certificate that they began with.
"""

from __future__ import annotations

import contextlib
import datetime
import ssl
import threading
from pathlib import Path
from typing import TypeAlias

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from safelight_server.files import read_regular_file

log = structlog.get_logger(__name__)

PemPair: TypeAlias = tuple[bytes, bytes]
"""The contents of the key file and of the certificate file, in the order in which gRPC takes them."""


class CertificateError(Exception):
    """The certificate and its key cannot be used; the message names the file and says what is wrong."""


class ServerCertificate:
    """A certificate and its key, in two PEM files that may be replaced while the server runs.

    Args:
        cert_file: the chain; the server's own certificate comes first.
        key_file: the key of that certificate, without a password.

    Raises:
        CertificateError: a file cannot be read or is no PEM, or the key does not belong to the certificate.
    """

    def __init__(self, cert_file: Path, key_file: Path) -> None:
        self._cert_file = cert_file
        self._key_file = key_file
        self._lock = threading.Lock()  # gRPC asks from threads of its own, HTTP from the event loop
        self._pair = self._read()
        self._check(self._pair)
        self._fault = ""

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for a gRPC server that presents the newest usable certificate to each new connection."""
        first = shown = self._pair

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """gRPC calls it before each handshake; None: the pair that it has is still the newest."""
            nonlocal shown
            if (newest := self.newest()) is shown:
                return None
            shown = newest
            return _configuration(shown)

        return grpc.dynamic_ssl_server_credentials(_configuration(first), changed)  # type: ignore[arg-type]

    def context(self) -> ssl.SSLContext:
        """A context with which an HTTP server presents the newest usable certificate to each new connection.

        Raises:
            CertificateError: the files cannot be used any more.
        """
        shown, current = self.newest(), self._load()

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            """OpenSSL calls it at the beginning of each handshake, whether the client names a server or not."""
            nonlocal shown, current
            if (newest := self.newest()) is not shown:
                with contextlib.suppress(CertificateError):  # replaced in this moment: the next handshake has it
                    shown, current = newest, self._load()
            connection.context = current

        context = self._load()
        context.sni_callback = choose
        return context

    def newest(self) -> PemPair:
        """Reads the files again. Returns what they hold, or where that cannot be used, what they held before."""
        with self._lock:
            try:
                pair = self._read()
                if pair != self._pair:
                    expires = self._check(pair)
                    log.info("certificate_reloaded", expires=expires.isoformat())
                    self._pair = pair
                self._fault = ""
            except CertificateError as error:
                if str(error) != self._fault:
                    log.error("certificate_not_reloaded", error=str(error))
                self._fault = str(error)
            return self._pair

    def _load(self) -> ssl.SSLContext:
        """A context of the files as they are: Python takes a certificate only from files."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert_file, self._key_file, password="")  # without one it asks a terminal
        except OSError as error:  # ssl.SSLError is one
            raise CertificateError(f"tls_cert_file {self._cert_file}: {error}") from None
        return context

    def _read(self) -> PemPair:
        try:
            return read_regular_file(self._key_file), read_regular_file(self._cert_file)
        except OSError as error:
            raise CertificateError(f"{error.filename}: {error.strerror}") from None

    def _check(self, pair: PemPair) -> datetime.datetime:
        """Returns when the certificate expires. gRPC itself would not say what is wrong with a file."""
        try:
            cert = x509.load_pem_x509_certificates(pair[1])[0]
        except ValueError:
            raise CertificateError(f"tls_cert_file {self._cert_file}: has no certificate in PEM") from None
        try:
            key = load_pem_private_key(pair[0], password=None)
        except TypeError:
            raise CertificateError(f"tls_key_file {self._key_file}: must be a key without a password") from None
        except (ValueError, UnsupportedAlgorithm):
            raise CertificateError(f"tls_key_file {self._key_file}: has no key in PEM that can be used") from None
        if key.public_key() != cert.public_key():
            raise CertificateError(f"tls_key_file {self._key_file}: is not the key of tls_cert_file {self._cert_file}")
        return cert.not_valid_after_utc


def _configuration(pair: PemPair) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([pair])
