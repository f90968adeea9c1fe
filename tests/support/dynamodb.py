"""Tables of DynamoDB in moto's server, behind a relay in which a test sees each call, and may change it or its answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
from safelight_server.storage.dynamodb import PARTITION, SORT

Answer = tuple[int, dict[str, Any]]
"""Status and body."""
Forward = Callable[[dict[str, Any]], Answer]
"""Sends a request's body to moto, and returns its answer."""
Hook = Callable[[str, dict[str, Any], Forward], Answer]
"""Answers a call, given its operation, such as "PutItem", its body, and what sends a body on."""


def forwarded(_operation: str, body: dict[str, Any], forward: Forward) -> Answer:
    """The hook that changes nothing."""
    return forward(body)


PASSED_ON = ("Content-Type", "X-Amz-Target", "Authorization", "X-Amz-Date")


class TableServer:
    """The relay.

    Attributes:
        endpoint: its URL.
        calls: operations and bodies of all calls so far.
        hook: answers the calls; by default moto does.
    """

    def __init__(self, moto: str) -> None:
        self.endpoint = ""
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.hook: Hook = forwarded
        self._moto = moto
        self._tables = 0

    def make_table(self) -> str:
        """A new table. Its name."""
        self._tables += 1
        name = f"bills-{threading.get_native_id()}-{id(self)}-{self._tables}"
        keys = {PARTITION: "HASH", SORT: "RANGE"}
        with self.client() as client:
            client.create_table(
                TableName=name,
                BillingMode="PAY_PER_REQUEST",
                AttributeDefinitions=[{"AttributeName": key, "AttributeType": "S"} for key in keys],
                KeySchema=[{"AttributeName": key, "KeyType": kind} for key, kind in keys.items()],
            )
        return name

    def items(self, table: str, kind: str = "bills#") -> dict[tuple[str, str], dict[str, Any]]:
        """The items whose partition begins with `kind`, by their keys."""
        with self.client() as client:
            pages = client.get_paginator("scan").paginate(TableName=table)
            found = [item for page in pages for item in page["Items"]]
        return {
            (item[PARTITION]["S"], item[SORT]["S"]): item for item in found if item[PARTITION]["S"].startswith(kind)
        }

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A client of moto itself, whose calls are not seen."""
        made = boto3.client(
            "dynamodb",
            endpoint_url=self._moto,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        try:
            yield made
        finally:
            made.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[TableServer]:
        """Answers calls during the block."""
        relay = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name: self.headers[name] for name in PASSED_ON if name in self.headers}
                operation = self.headers["X-Amz-Target"].partition(".")[2]
                status, answer = relay._answer(operation, json.loads(content), headers)
                said = json.dumps(answer).encode()
                with contextlib.suppress(OSError):  # the caller was killed
                    self.send_response(status)
                    self.send_header("Content-Type", "application/x-amz-json-1.0")
                    self.send_header("Content-Length", str(len(said)))
                    self.end_headers()
                    self.wfile.write(said)

            def log_message(self, format: str, *args: object) -> None:
                """Writes no log: standard error belongs to the tests."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            self.endpoint = f"http://127.0.0.1:{server.server_port}"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    def _answer(self, operation: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        self.calls.append((operation, body))

        def forward(changed: dict[str, Any]) -> Answer:
            address = urllib.parse.urlsplit(self._moto)
            with contextlib.closing(http.client.HTTPConnection(address.netloc, timeout=30)) as connection:
                connection.request("POST", "/", json.dumps(changed).encode(), headers)
                answer = connection.getresponse()
                said: dict[str, Any] = json.loads(answer.read())
                return answer.status, said

        return self.hook(operation, body, forward)
