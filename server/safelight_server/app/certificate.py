"""The server's TLS certificate and the authorities of its clients, for gRPC and HTTP; read again when files change.

The files are small, so they are read and compared before each handshake, which costs little compared with it. New files
that cannot be used, such as a pair of which only one file has been written yet, are logged once, and the present pair
stays in use. Open connections keep the certificate that they began with.
"""

from __future__ import annotations

import contextlib
import datetime
import ssl
import threading
from pathlib import Path
from typing import NamedTuple

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from safelight_server.files import read_regular_file

log = structlog.get_logger(__name__)


class PemFiles(NamedTuple):
    """The content of the files.

    Attributes:
        client_ca: the authorities of clients; None: clients need no certificate.
    """

    key: bytes
    cert: bytes
    client_ca: bytes | None


class CertificateError(Exception):
    """The certificate and its key cannot be used; the message names the file and says what is wrong."""


class ServerCertificate:
    """A certificate and its key, in two PEM files that may be replaced while the server runs.

    Args:
        cert_file: the chain; the server's own certificate comes first.
        key_file: the key of that certificate, without a password.
        client_ca_file: the authorities, one of which must have signed the certificate of each client. None: clients
            need no certificate.

    Raises:
        CertificateError: a file cannot be read or is no PEM, or the key does not belong to the certificate.
    """

    def __init__(self, cert_file: Path, key_file: Path, client_ca_file: Path | None = None) -> None:
        self._cert_file = cert_file
        self._key_file = key_file
        self._client_ca_file = client_ca_file
        self._lock = threading.Lock()  # gRPC calls `newest` from threads of its own, HTTP from the event loop
        self._files = self._read()
        self._check(self._files)
        self._fault = ""

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for a gRPC server that presents the newest usable certificate to each new connection."""
        first = shown = self._files
        asks_clients = self._client_ca_file is not None

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """gRPC calls this before each handshake; None: its pair is still the newest."""
            nonlocal shown
            if (newest := self.newest()) is shown:
                return None
            shown = newest
            return _configuration(shown)

        return grpc.dynamic_ssl_server_credentials(_configuration(first), changed, asks_clients)  # type: ignore[arg-type]

    def context(self) -> ssl.SSLContext:
        """A context with which an HTTP server presents the newest usable certificate to each new connection.

        Raises:
            CertificateError: the files cannot be used any more.
        """
        shown, current = self.newest(), self._load()

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            """OpenSSL calls this at the beginning of each handshake, whether the client names a server or not."""
            nonlocal shown, current
            if (newest := self.newest()) is not shown:
                with contextlib.suppress(CertificateError):  # files that are just being replaced: tried again next time
                    shown, current = newest, self._load()
            connection.context = current

        context = self._load()
        context.sni_callback = choose
        return context

    def newest(self) -> PemFiles:
        """Reads the files again. Returns their content or, if that cannot be used, the last usable content."""
        with self._lock:
            try:
                files = self._read()
                if files != self._files:
                    expires = self._check(files)
                    log.info("certificate_reloaded", expires=expires.isoformat())
                    self._files = files
                self._fault = ""
            except CertificateError as error:
                if str(error) != self._fault:
                    log.error("certificate_not_reloaded", error=str(error))
                self._fault = str(error)
            return self._files

    def _load(self) -> ssl.SSLContext:
        """A context of the present files: Python loads certificates only from files."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert_file, self._key_file, password="")  # None would prompt on a terminal
            if self._client_ca_file is not None:
                context.load_verify_locations(self._client_ca_file)
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:  # ssl.SSLError is one
            raise CertificateError(f"tls_cert_file {self._cert_file}: {error}") from None
        return context

    def _read(self) -> PemFiles:
        try:
            client_ca = read_regular_file(self._client_ca_file) if self._client_ca_file is not None else None
            return PemFiles(read_regular_file(self._key_file), read_regular_file(self._cert_file), client_ca)
        except OSError as error:
            raise CertificateError(f"{error.filename}: {error.strerror}") from None

    def _check(self, files: PemFiles) -> datetime.datetime:
        """Checks the files, since gRPC's errors do not say what is wrong. Returns when the certificate expires."""
        try:
            cert = x509.load_pem_x509_certificates(files.cert)[0]
        except ValueError:
            raise CertificateError(f"tls_cert_file {self._cert_file}: has no certificate in PEM") from None
        try:
            if files.client_ca is not None:
                x509.load_pem_x509_certificates(files.client_ca)
        except ValueError:
            raise CertificateError(f"tls_client_ca_file {self._client_ca_file}: has no certificate in PEM") from None
        try:
            key = load_pem_private_key(files.key, password=None)
        except TypeError:
            raise CertificateError(f"tls_key_file {self._key_file}: must be a key without a password") from None
        except (ValueError, UnsupportedAlgorithm):
            raise CertificateError(f"tls_key_file {self._key_file}: has no key in PEM that can be used") from None
        if key.public_key() != cert.public_key():
            raise CertificateError(f"tls_key_file {self._key_file}: is not the key of tls_cert_file {self._cert_file}")
        return cert.not_valid_after_utc


def _configuration(files: PemFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.cert)], files.client_ca)
