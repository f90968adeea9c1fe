"""Fixtures: a real redis-server and a real S3 server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from safelight_server.cli import bills as bill_commands
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.clock import SharedClock
from safelight_server.storage.redis import RedisConnection

from tests.support.bills import Ran, Stream, run_command
from tests.support.redis_server import RedisServer
from tests.support.replicas import key_file

BUCKET = "pictures"
CREDENTIALS = ("id", "secret")


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A running redis-server without persistence."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., RedisConnection]]:
    """Opens connections that are closed after the test."""
    connections = []

    def open_connection(url: str, timeout_s: float = 5.0, clock: SharedClock | None = None) -> RedisConnection:
        connections.append(RedisConnection(url, timeout_s, clock))
        return connections[-1]

    yield open_connection
    for connection in connections:
        await connection.close()


@pytest.fixture
async def replicas(connect: Callable[..., RedisConnection]) -> AsyncIterator[Callable[..., RedisCoordinator]]:
    """Makes coordinators of replicas, each with a connection and a breaker of its own."""
    coordinators = []

    def replica(url: str, timeout_s: float = 5.0, open_s: float = 0.1, **options: float) -> RedisCoordinator:
        breaker = Breaker("redis", timeout_s, max_failures=3, open_s=open_s)
        coordinators.append(RedisCoordinator(connect(url, timeout_s), breaker, **options))  # type: ignore[arg-type]
        return coordinators[-1]

    yield replica
    for coordinator in coordinators:
        await coordinator.close()


@pytest.fixture
def s3_server() -> Iterator[str]:
    """moto's server with an empty bucket; its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    make_bucket(endpoint)
    yield endpoint
    server.stop()


def make_bucket(endpoint: str) -> None:
    """An empty bucket on an S3 server."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=CREDENTIALS[0],
        aws_secret_access_key=CREDENTIALS[1],
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()


@pytest.fixture
def command(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs `safelight bills` in this process."""
    given = {"SAFELIGHT_REDIS_URL": redis_server.url, "SAFELIGHT_CACHE_KEY_FILE": key_file(tmp_path), "COLUMNS": 120}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(
        bill_commands, "configure_logging", lambda *_: None
    )  # it must not change the logging of other tests

    return lambda *arguments: run_command(monkeypatch, capfd, "bills", *arguments)


@pytest.fixture
def stream(redis_server: RedisServer, tmp_path: Path) -> Iterator[Stream]:
    made = Stream(redis_server, key_file(tmp_path))
    yield made
    made.client.close()
