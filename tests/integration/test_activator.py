"""`safelight activator` as a process, with TLS on both sides."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safelight import Client, GenerationError
from safelight_server.api.identity import new_key

from load_tests.ports import free_port
from tests.conftest import serving_here
from tests.support.certificates import NAME, new_pair, self_signed
from tests.support.http import GENERATIONS, body, server_sent

COMMAND = [sys.executable, "-m", "safelight_server", "activator"]


def begun(log: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen([*COMMAND, *arguments], env=os.environ | environment, stderr=output)


def ready_at(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Waits until it serves; returns the address in its log."""
    while True:
        for line in log.read_text().split("\n")[:-1]:  # without the line that is just being written
            if (event := json.loads(line))["event"] == "serving":
                return str(event["address"])
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)  # the process that is waited for needs the processor


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


async def test_with_mtls_it_wants_certificates_and_has_one(tmp_path):
    cert, private = self_signed(tmp_path)
    caller, caller_key = self_signed(tmp_path, "caller.example")
    own, authorities = tmp_path / "own.pem", tmp_path / "authorities.pem"
    pair = new_pair("activator.example")
    own.write_bytes(pair[0] + pair[1])
    authorities.write_bytes(caller.read_bytes() + pair[0])
    files = {"tls_cert_file": cert, "tls_key_file": private, "tls_client_ca_file": authorities}
    http_port, replica_http_port, log = free_port(), free_port(), tmp_path / "log"
    environment = {f"SAFELIGHT_{name.upper()}": str(value) for name, value in files.items()} | {
        "SAFELIGHT_HOST": "127.0.0.1", "SAFELIGHT_PORT": "0", "SAFELIGHT_HTTP_PORT": str(http_port),
        "SAFELIGHT_LOG_FORMAT": "json", "SAFELIGHT_METRICS_PORT": "0",
    }  # fmt: skip
    async with serving_here(runtime="simulated", http_port=replica_http_port, **files) as server:
        fleet = [f"--fleet={server.address}", f"--ca-file={cert}", f"--server-name={NAME}"]
        process = begun(
            log, [*fleet, f"--client-cert-file={own}", f"--fleet-http-port={replica_http_port}"], environment
        )
        try:
            address = await asyncio.to_thread(ready_at, log, process)
            trusted, url, at = cert.read_bytes(), f"https://127.0.0.1:{http_port}", {"sni_hostname": NAME}
            with_caller = grpc.ssl_channel_credentials(trusted, caller_key.read_bytes(), caller.read_bytes())
            async with Client(address, credentials=with_caller, server_name=NAME) as client:
                assert (await client.generate("a red potion", steps=4, seed=1).picture()).data
            with pytest.raises(GenerationError) as refused:
                without = grpc.ssl_channel_credentials(trusted)
                async with Client(address, credentials=without, server_name=NAME) as stranger:
                    await stranger.models()
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
            context = ssl.create_default_context(cafile=cert)
            async with httpx2.AsyncClient(verify=context, trust_env=False, timeout=30) as stranger:
                with pytest.raises(httpx2.TransportError):
                    await stranger.get(f"{url}/v1/models", extensions=at)
            context = ssl.create_default_context(cafile=cert)
            context.load_cert_chain(caller, caller_key)
            async with httpx2.AsyncClient(verify=context, trust_env=False, timeout=30) as http:
                asked = body(stream=True, partial_images=1)
                response = await http.post(f"{url}{GENERATIONS}", json=asked, extensions=at)
                assert server_sent(response.text)[-1][0] == "image_generation.completed"
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fleet=nowhere"], "is not HOST:PORT"),
        (["--fleet=a:1", "--ca-file=/nowhere"], "No such file"),
    ],
)
def test_faults_are_named(arguments, words):
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 2
    assert words in " ".join(ended.stderr.replace("│", " ").split())
