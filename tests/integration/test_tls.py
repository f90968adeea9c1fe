"""TLS from end to end: the server's certificate and its renewal, the client library and the command line."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
from pathlib import Path

import grpc
import httpx2
import pytest
import structlog
from safelight import Client, Finished, GenerationError
from safelight_server.app.certificate import CertificateError, ServerCertificate

from load_tests.ports import free_port
from tests.support.certificates import NAME, new_pair, self_signed
from tests.support.http import GENERATIONS, body, server_sent


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    return self_signed(tmp_path)


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


@pytest.fixture
async def mutual(start, pair, tmp_path):
    """A server that demands client certificates, on gRPC and HTTP, and a certificate and key that it accepts."""
    own = self_signed(tmp_path, "client.example")
    tls = {"tls_cert_file": pair[0], "tls_key_file": pair[1], "tls_client_ca_file": own[0], "http_port": free_port()}
    async with start(runtime="simulated", simulated_base_ms=1.0, **tls) as running:
        yield running, own


async def test_a_server_that_asks_for_certificates_serves_only_those_by_its_authority(mutual, pair):
    running, own = mutual
    trusted = pair[0].read_bytes()

    async def serves(*key_and_chain: bytes) -> bool:
        credentials = grpc.ssl_channel_credentials(trusted, *key_and_chain)
        client = Client(running.address, credentials=credentials, server_name=NAME)
        async with client:
            try:
                return bool(await client.models())
            except GenerationError as error:
                assert error.code is grpc.StatusCode.UNAVAILABLE
                return False

    other, other_key = new_pair("other.example")
    assert await serves(own[1].read_bytes(), own[0].read_bytes())
    assert not await serves()
    assert not await serves(other_key, other)
    own[0].write_bytes(own[0].read_bytes() + other)  # another authority is added while the server runs
    assert await serves(other_key, other)


async def test_http_asks_for_certificates_too(mutual, pair):
    running, own = mutual

    async def answers(context: ssl.SSLContext) -> bool:
        async with httpx2.AsyncClient(verify=context, trust_env=False, timeout=30) as http:
            try:
                url = f"https://{running.http_address}/v1/models"
                return (await http.get(url, extensions={"sni_hostname": NAME})).status_code == 200
            except httpx2.TransportError:
                return False

    def trusting() -> ssl.SSLContext:
        return ssl.create_default_context(cafile=pair[0])

    with_own, with_other = trusting(), trusting()
    with_own.load_cert_chain(*own)
    with_other.load_cert_chain(*pair)
    assert await answers(with_own)
    assert not await answers(trusting())
    assert not await answers(with_other)
    own[0].write_bytes(own[0].read_bytes() + pair[0].read_bytes())  # an authority is added while the server runs
    assert await answers(with_other)


async def test_the_command_line_shows_its_certificate(mutual, pair, tmp_path):
    running, own = mutual
    both = tmp_path / "both.pem"
    both.write_bytes(own[0].read_bytes() + own[1].read_bytes())
    trusting = ("--ca-file", str(pair[0]), "--server-name", NAME)
    assert await health(running.address, *trusting, "--client-cert-file", str(both)) == 0
    assert await health(running.address, *trusting) == 1
    assert await health(running.address, "--client-cert-file", str(both)) == 2


async def test_http_has_the_same_certificate(start, pair):
    address, trusting = f"127.0.0.1:{free_port()}", ssl.create_default_context(cafile=pair[0])
    tls = {"tls_cert_file": pair[0], "tls_key_file": pair[1], "http_port": int(address.rpartition(":")[2])}
    async with start(runtime="simulated", simulated_base_ms=1.0, **tls):
        async with httpx2.AsyncClient(verify=trusting, trust_env=False, timeout=30) as http:
            at = {"sni_hostname": NAME}
            response = await http.get(f"https://{address}/v1/models", extensions=at)
            assert (response.status_code, response.json()["object"]) == (200, "list")
            asked = body(stream=True, partial_images=3)
            response = await http.post(f"https://{address}{GENERATIONS}", json=asked, extensions=at)
            assert server_sent(response.text)[-1][0] == "image_generation.completed"
            with pytest.raises(httpx2.TransportError):
                await http.get(f"http://{address}/v1/models")
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
            with pytest.raises(httpx2.ConnectError):
                await http.get(f"https://{address}/v1/models")


async def test_http_presents_the_certificate_that_is_there(start, pair, tmp_path):
    port = free_port()

    async def presented() -> bytes:
        anyone = ssl.create_default_context()
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=anyone)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        return der

    def der(cert_file: Path) -> bytes:
        return ssl.PEM_cert_to_DER_cert(cert_file.read_text())

    tls = {"tls_cert_file": pair[0], "tls_key_file": pair[1], "http_port": port}
    async with start(runtime="simulated", simulated_base_ms=1.0, **tls):
        first = der(pair[0])
        assert await presented() == first
        key = pair[1].read_bytes()
        self_signed(tmp_path, NAME)
        new_key = pair[1].read_bytes()
        pair[1].write_bytes(key)  # the other half of the pair follows
        assert await presented() == first
        pair[1].write_bytes(new_key)
        assert await presented() == der(pair[0]) != first
        pair[0].unlink()
        assert await presented() != first


async def test_the_command_line_asks_by_tls(server, pair):
    """As for a container's health check."""
    assert await health(server.address, "--ca-file", str(pair[0]), "--server-name", NAME) == 0
    assert await health(server.address) == 1, "Docker's health check reserves 2"


async def health(address: str, *arguments: str) -> int:
    """The exit status of `safelight health`."""
    command = (sys.executable, "-m", "safelight_server.cli.main", "health", "--target", address, *arguments)
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    return await process.wait()


async def presented(address: str) -> bytes:
    """The certificate, as PEM, that the server presents to a new connection."""

    def ask() -> bytes:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as connection, context.wrap_socket(connection) as tls:
            return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"").encode()

    return await asyncio.to_thread(ask)


async def test_a_new_connection_sees_a_renewed_certificate_and_an_old_one_lives_on(server, pair):
    cert_file, key_file = pair
    credentials = grpc.ssl_channel_credentials(cert_file.read_bytes())
    cert, key = new_pair(days=2)
    async with Client(server.address, credentials=credentials, server_name=NAME) as client:
        events = client.generate("x", steps=50)
        await anext(events)
        cert_file.write_bytes(cert)
        key_file.write_bytes(key)
        assert await presented(server.address) == cert
        assert isinstance([event async for event in events][-1], Finished)
    credentials = grpc.ssl_channel_credentials(cert)
    async with Client(server.address, credentials=credentials, server_name=NAME) as client:
        assert await client.models()


async def test_a_pair_that_cannot_be_used_is_told_once_and_changes_nothing(server, pair):
    cert_file, key_file = pair
    before = cert_file.read_bytes(), key_file.read_bytes()
    cert, key = new_pair()
    with structlog.testing.capture_logs() as logs:
        for half_written in (cert, cert[:100]):
            cert_file.write_bytes(half_written)
            for _ in range(3):
                assert await presented(server.address) == before[0]
        cert_file.unlink()
        assert await presented(server.address) == before[0]
        cert_file.write_bytes(cert)
        key_file.write_bytes(key)
        assert await presented(server.address) == cert
    assert [line["event"] for line in logs] == ["certificate_not_reloaded"] * 3 + ["certificate_reloaded"]
    assert "is not the key of" in logs[0]["error"]


@pytest.mark.parametrize("at", [0, 1])
def test_at_start_it_is_an_error_that_names_the_file(pair, at):
    for content, says in ((b"not PEM", "in PEM"), (new_pair()[at], "is not the key of"), (None, "No such file")):
        if content is None:
            pair[at].unlink()
        else:
            pair[at].write_bytes(content)
        with pytest.raises(CertificateError, match=says) as caught:
            ServerCertificate(*pair)
        assert str(pair[at]) in str(caught.value)


def test_authorities_of_clients_that_cannot_be_used_are_an_error_that_names_the_file(pair, tmp_path):
    authorities = tmp_path / "clients.pem"
    with pytest.raises(CertificateError, match=r"clients\.pem: No such file"):
        ServerCertificate(*pair, authorities)
    authorities.write_bytes(b"not PEM")
    with pytest.raises(CertificateError, match=r"tls_client_ca_file .*clients\.pem: has no certificate in PEM"):
        ServerCertificate(*pair, authorities)
