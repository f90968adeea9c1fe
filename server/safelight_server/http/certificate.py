"""The TLS certificate of HTTP, which is read again when its files change, so that it can be renewed."""

from __future__ import annotations

import ssl
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_Stamp = tuple[tuple[int, ...], ...]


class RenewableCertificate:
    """A certificate and its key in PEM files, and who signs those of clients. Each handshake has what is there.

    A pair that cannot be used, such as one that is half written, is logged once, and the pair before it stays.

    Attributes:
        context: what a server wraps its connections with.

    Raises:
        OSError, ssl.SSLError: the files cannot be used.
    """

    def __init__(self, cert_file: Path, key_file: Path, client_ca_file: Path | None = None) -> None:
        self._pair = cert_file, key_file
        self._client_ca_file = client_ca_file
        self._stamp = self._stamps()
        self._newest = self._load()
        self.context = self._load()
        self.context.sni_callback = self._choose
        self._fault = ""

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called at the beginning of each handshake, whether the client names a server or not."""
        try:
            stamp = self._stamps()
            if stamp != self._stamp:
                self._stamp = stamp
                self._newest = self._load()
                log.info("certificate_reloaded", listener="http")
                self._fault = ""
        except OSError as error:  # ssl.SSLError is one
            if str(error) != self._fault:
                log.error("certificate_not_reloaded", listener="http", error=str(error))
            self._fault = str(error)
        connection.context = self._newest

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self._pair, password="")  # without one, OpenSSL would ask a terminal
        if self._client_ca_file is not None:
            context.load_verify_locations(self._client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _stamps(self) -> _Stamp:
        files = self._pair if self._client_ca_file is None else (*self._pair, self._client_ca_file)
        statuses = [file.stat() for file in files]
        return tuple((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino) for status in statuses)
