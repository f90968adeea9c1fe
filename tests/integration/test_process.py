"""The server as a process: signals, standard files that are closed or full, and what it writes to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from safelight import Client, Finished
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from load_tests.ports import free_port
from tests.conftest import eventually
from tests.support.certificates import NAME, self_signed
from tests.support.spans import traceparent

ROOT = Path(__file__).parent.parent.parent
FULL = Path("/dev/full")
START_S = 50.0
pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Served:
    """A server process on a unix socket, or with TLS on a port."""

    process: subprocess.Popen[bytes]
    target: str
    log: Path

    def events(self) -> list[str]:
        """The events in its log; fails if a line is not a JSON object."""
        whole = self.log.read_text().split("\n")[:-1]  # without the line that is just being written
        return [json.loads(line)["event"] for line in whole]

    def file(self, number: int) -> str:
        """The target of a file descriptor of the process."""
        return str(Path(f"/proc/{self.process.pid}/fd/{number}").readlink())

    async def ends(self, number: int) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 30)


@contextlib.asynccontextmanager
async def served(
    folder: Path,
    target: str = "",
    stdout: Path = Path(os.devnull),
    before: str = "",
    **environment: str,
) -> AsyncIterator[Served]:
    """Runs `safelight serve`, and waits until it serves.

    Args:
        target: HOST:PORT; empty: a unix socket in `folder`.
        before: statements that the new process runs before it becomes the server.
    """
    target = target or f"unix:{folder}/socket"
    server = begin(target, folder / "log", stdout, before, environment)
    try:
        await eventually(lambda: server.process.poll() is not None or answers(target), START_S)
        assert server.process.poll() is None, server.log.read_text()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def begin(target: str, log: Path, stdout: Path, before: str, environment: dict[str, str]) -> Served:
    host, port = (target, "0") if target.startswith("unix:") else target.split(":")
    # A program that then becomes the server (exec), since gRPC's fork handlers may abort in code between fork and exec.
    # The tests themselves may run under nohup, which servers inherit.
    launch = f"import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); {before}\nos.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", launch, sys.executable]
    command += ["-m", "safelight_server", "serve", "--host", host, "--port", port]
    env = {"PYTHONPATH": f"{ROOT}/server:{ROOT}/clients/python", "PATH": "/usr/bin", "SAFELIGHT_RUNTIME": "simulated"}
    env |= {"SAFELIGHT_LOG_FORMAT": "json", "SAFELIGHT_SIMULATED_BASE_MS": "5"} | environment
    with log.open("wb") as stderr, stdout.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=stderr, env=env)
    return Served(process, target, log)


def answers(target: str) -> bool:
    """Whether something listens at the target."""
    unix = target.startswith("unix:")
    host, _, port = target.partition(":")
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as client:
        return client.connect_ex(port if unix else (host, int(port))) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_what_runs_finish(short_path, number):
    async with served(short_path) as server, Client(server.target, patience_s=0.0) as client:
        events = client.generate("x", steps=50)
        await anext(events)
        ending = asyncio.create_task(server.ends(number))
        await eventually(lambda: "draining" in server.events() or ending.done())
        server.process.send_signal(signal.SIGHUP)  # a closing terminal sends two
        assert isinstance([event async for event in events][-1], Finished)
        assert await ending == 0
        assert not (short_path / "socket").exists()


async def test_a_second_signal_ends_a_drain_and_nohup_ignores_sighup(short_path):
    as_nohup_does = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    slow = {"SAFELIGHT_SIMULATED_BASE_MS": "2000"}
    async with served(short_path, before=as_nohup_does, **slow) as server, Client(server.target) as client:
        server.process.send_signal(signal.SIGHUP)
        await client.models()
        events = client.generate("x", steps=50)
        await anext(events)
        server.process.send_signal(signal.SIGTERM)
        await eventually(lambda: "draining" in server.events())
        assert await server.ends(signal.SIGINT) == 0
        await events.aclose()


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
@pytest.mark.parametrize("log_format", ["auto", "json"])
async def test_it_serves_where_it_can_write_to_nobody(short_path, closed, log_format):
    close = "; ".join(f"os.close({number})" for number in closed)
    async with served(short_path, stdout=FULL, before=close, SAFELIGHT_LOG_FORMAT=log_format) as server:
        async with Client(server.target) as client:
            assert [event async for event in client.generate("x", steps=2)]
        assert {server.file(number) for number in closed} == {os.devnull}, "nothing else may get the number of stderr"
        assert await server.ends(signal.SIGTERM) == 0


async def test_a_summary_that_cannot_be_printed_is_a_line_of_the_log(short_path):
    async with served(short_path, stdout=FULL) as server:
        await eventually(lambda: "summary_not_printed" in server.events())
        assert await server.ends(signal.SIGTERM) == 0


async def test_nobody_writes_lines_of_his_own_into_the_log(short_path):
    """Neither by a library's warnings nor by messages of gRPC's core about a handshake."""
    cert_file, key_file = self_signed(short_path)
    target = f"127.0.0.1:{free_port()}"
    tls = {"SAFELIGHT_TLS_CERT_FILE": str(cert_file), "SAFELIGHT_TLS_KEY_FILE": str(key_file)}
    credentials = grpc.ssl_channel_credentials(cert_file.read_bytes())
    options = [("grpc.ssl_target_name_override", NAME)]
    async with served(short_path, target, **tls) as server:
        with socket.create_connection(tuple(target.split(":"))) as plain:
            plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                plain.recv(100)
        async with grpc.aio.secure_channel(target, credentials, options) as channel:
            stub = stubs.GenerationServiceStub(channel)
            for state in ('{"event": "keys_reloaded"}', "x" * 7000, "a=" + "b" * 600, "a=b,a=b", "a=b"):
                metadata = (*traceparent("a" * 32), ("tracestate", state))
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.GetGeneration(pb.GetGenerationRequest(name="generations/x"), metadata=metadata)
        assert await server.ends(signal.SIGTERM) == 0
        assert server.events()[-6:] == [*["refused"] * 5, "draining"]
