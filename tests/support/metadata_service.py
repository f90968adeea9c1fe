"""A fake metadata service of a spot instance (IMDSv2): real HTTP on loopback, with tokens that can expire."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from http import HTTPStatus

from tests.support.loopback import answering

TOKEN_PATH, NOTICE_PATH = "/latest/api/token", "/latest/meta-data/spot/instance-action"


class MetadataService:
    """The service.

    Attributes:
        notice: the notice for the instance; empty: none.
        broken: whether it answers with a server error.
        asked: method and status of each request so far.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.notice = ""
        self.broken = False
        self.asked: list[tuple[str, int]] = []
        self._tokens: list[str] = []

    def expire(self) -> None:
        """Makes all tokens invalid."""
        self._tokens.clear()

    def num_asked(self, status: HTTPStatus) -> int:
        """How often a request for the notice got this status."""
        return self.asked.count(("GET", status))

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[HTTPStatus, str]:
        """Answers a request; names of headers are in lower case."""
        status, text = self._answer(method, path, headers)
        self.asked.append((method, status))
        return status, text

    def _answer(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[HTTPStatus, str]:
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
    """Runs the service on a free loopback port during the block."""

    def answer(method: str, path: str, headers: Mapping[str, str]) -> tuple[HTTPStatus, bytes]:
        status, text = service.answer(method, path, headers)
        return status, text.encode()

    with answering(answer) as port:
        service = MetadataService(port)
        yield service
