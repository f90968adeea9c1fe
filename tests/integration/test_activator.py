"""`safelight activator` as a process, with TLS on both sides."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safelight import Client
from safelight_server.api.identity import new_key

from load_tests.ports import free_port
from tests.conftest import serving_here
from tests.support.certificates import NAME, self_signed

COMMAND = [sys.executable, "-m", "safelight_server", "activator"]


def begun(log: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen([*COMMAND, *arguments], env=os.environ | environment, stderr=output)


def ready_at(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Waits until it serves; returns the address in its log."""
    while True:
        for line in log.read_text().splitlines():
            if (event := json.loads(line))["event"] == "serving":
                return str(event["address"])
        assert process.poll() is None, log.read_text()


async def test_it_forwards_to_its_fleet_and_drains(tmp_path):
    cert, private = self_signed(tmp_path)
    key, entry = new_key("me", "studio")
    (tmp_path / "keys.json").write_text(f'{{"keys": [{entry}]}}')
    files = {"tls_cert_file": cert, "tls_key_file": private, "api_key_file": tmp_path / "keys.json"}
    probe, log = free_port(), tmp_path / "log"
    environment = {f"SAFELIGHT_{name.upper()}": str(value) for name, value in files.items()} | {
        "SAFELIGHT_HOST": "127.0.0.1", "SAFELIGHT_PORT": "0", "SAFELIGHT_PROBE_PORT": str(probe),
        "SAFELIGHT_LOG_FORMAT": "json", "SAFELIGHT_METRICS_PORT": "0",
    }  # fmt: skip
    async with serving_here(runtime="simulated", **files) as server:
        fleet = [f"--fleet={server.address}", f"--ca-file={cert}", f"--server-name={NAME}"]
        process = begun(log, fleet, environment)
        try:
            address = await asyncio.to_thread(ready_at, log, process)
            credentials = grpc.ssl_channel_credentials(cert.read_bytes())
            async with Client(address, api_key=key, credentials=credentials, server_name=NAME) as client:
                assert (await client.generate("a red potion", steps=4, seed=1).picture()).data
            async with grpc.aio.insecure_channel(f"127.0.0.1:{probe}") as channel:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 30) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--fleet=nowhere"], "is not HOST:PORT"), (["--fleet=a:1", "--ca-file=/nowhere"], "No such file")],
)
def test_faults_are_named(arguments, words):
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 2
    assert words in " ".join(ended.stderr.replace("│", " ").split())
