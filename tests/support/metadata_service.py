"""Plays the metadata service of a spot instance (IMDSv2): over real HTTP, on loopback, with tokens that can expire."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN_PATH, NOTICE_PATH = "/latest/api/token", "/latest/meta-data/spot/instance-action"


class MetadataService:
    """The service.

    Attributes:
        notice: what it says of the instance; empty: nothing.
        broken: it answers with an error of its own.
        asked: method and status of each request so far.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.notice = ""
        self.broken = False
        self.asked: list[tuple[str, int]] = []
        self._tokens: list[str] = []

    def expire(self) -> None:
        """No token that was given out is good any more."""
        self._tokens.clear()

    def num_asked(self, status: HTTPStatus) -> int:
        """How often the notice was asked for with this answer."""
        return self.asked.count(("GET", status))

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[HTTPStatus, str]:
        """Answers a request; names of headers are in lower case."""
        status, text = self._answer(method, path, headers)
        self.asked.append((method, status))
        return status, text

    def _answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[HTTPStatus, str]:
        if self.broken:
            return HTTPStatus.INTERNAL_SERVER_ERROR, ""
        if (method, path) == ("PUT", TOKEN_PATH):
            if not 1 <= int(headers["x-aws-ec2-metadata-token-ttl-seconds"]) <= 21_600:
                return HTTPStatus.BAD_REQUEST, ""
            self._tokens.append(f"token {len(self.asked)}")
            return HTTPStatus.OK, self._tokens[-1]
        if headers.get("x-aws-ec2-metadata-token") not in self._tokens:
            return HTTPStatus.UNAUTHORIZED, ""
        if path != NOTICE_PATH or not self.notice:
            return HTTPStatus.NOT_FOUND, ""
        return HTTPStatus.OK, self.notice


@contextlib.contextmanager
def metadata_service() -> Iterator[MetadataService]:
    """Runs one on a free port of loopback while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._reply()

        def do_GET(self) -> None:
            self._reply()

        def _reply(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, text = service.answer(self.command, self.path, headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is written: standard error is the tests'."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service = MetadataService(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()
