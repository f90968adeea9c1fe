"""TLS from end to end: the server's certificate, the client library and the command line."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc
import pytest
from safelight import Client, Finished, GenerationError

from tests.support.certificates import self_signed

NAME = "safelight.example"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    return self_signed(tmp_path, NAME)


@pytest.fixture
async def server(start, pair):
    tls = {"tls_cert_file": pair[0], "tls_key_file": pair[1]}
    async with start(runtime="simulated", simulated_base_ms=1.0, **tls) as running:
        yield running


async def test_a_client_with_the_certificate_is_served_and_one_without_is_not(server, pair):
    credentials = grpc.ssl_channel_credentials(pair[0].read_bytes())
    async with Client(server.address, credentials=credentials, server_name=NAME) as client:
        events = [event async for event in client.generate("x", steps=2)]
        assert isinstance(events[-1], Finished)
    for without in ({}, {"credentials": credentials}):
        async with Client(server.address, **without) as client:
            with pytest.raises(GenerationError):
                await client.models()


async def test_the_command_line_asks_by_tls(server, pair):
    """As a container's health check has to."""

    async def health(*arguments: str) -> int | None:
        command = (sys.executable, "-m", "safelight_server.cli.main", "health", "--target", server.address, *arguments)
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        return await process.wait()

    assert await health("--ca-file", str(pair[0]), "--server-name", NAME) == 0
    assert await health() == 2
