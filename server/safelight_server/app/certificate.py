"""The server's TLS certificate, which is read again when its files change.

gRPC asks for it before each handshake. The two files are small, so they are read and compared each time: beside a
handshake that costs nothing. A new pair that cannot be used, such as one of which only one file has been written yet,
is logged once, and the pair in force stays. Connections that are open keep the certificate that they began with.
"""

from __future__ import annotations

import datetime
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
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self._pair = self._read()
        self._check(self._pair)
        self._fault = ""

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for a gRPC server that presents the newest usable certificate to each new connection."""
        first = _configuration(self._pair)
        return grpc.dynamic_ssl_server_credentials(first, self.renewed)  # type: ignore[arg-type]  # None: no change

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Reads the files again. Returns the pair if it is a new one that can be used, else None."""
        with self._lock:
            try:
                pair = self._read()
                if pair == self._pair:
                    self._fault = ""
                    return None
                expires = self._check(pair)
            except CertificateError as error:
                if str(error) != self._fault:
                    log.error("certificate_not_reloaded", error=str(error))
                self._fault = str(error)
                return None
            self._pair, self._fault = pair, ""
        log.info("certificate_reloaded", expires=expires.isoformat())
        return _configuration(pair)

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
