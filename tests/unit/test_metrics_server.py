"""The metrics server answers scrapes and bounds the connections, their time and their size."""

from __future__ import annotations

import asyncio
import gzip
import threading
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry, Counter
from safelight_server.telemetry.metrics_server import MAX_CONNECTIONS, MAX_HEAD_BYTES, MetricsServer

from load_tests.ports import free_port
from tests.conftest import eventually

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving_metrics(**limits: float):
    registry = CollectorRegistry()
    Counter("pictures", "Pictures", registry=registry).inc(7)
    Counter("steps", "Steps", registry=registry).inc(9)
    server = MetricsServer(registry, **limits)
    async with server.listening("127.0.0.1", 0) as port:
        yield server, port


async def exchange(port: int, request: bytes) -> tuple[bytes, bytes]:
    """Status line and body of an answer; empty if the connection was closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    except ConnectionError:
        head = body = b""
    writer.close()
    return head.partition(b"\r\n")[0], body


async def test_a_scrape_gets_all_metrics():
    async with serving_metrics() as (server, port):
        status, body = await exchange(port, SCRAPE)
        assert status == b"HTTP/1.0 200 OK"
        assert b"pictures_total 7.0" in body
        assert b"steps_total 9.0" in body
        await eventually(lambda: server.num_connections == 0)


async def test_a_scrape_may_name_metrics_and_ask_for_compression():
    async with serving_metrics() as (_, port):
        request = b"GET /metrics?name[]=pictures_total HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n"
        status, body = await exchange(port, request)
        text = gzip.decompress(body)
        assert status == b"HTTP/1.0 200 OK"
        assert b"pictures_total 7.0" in text
        assert b"steps_total" not in text


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.0 405 Method Not Allowed"),
        (b"\xff\xfe\r\n\r\n", b"HTTP/1.0 400 Bad Request"),
        (b"GET /metrics\r\n\r\n", b"HTTP/1.0 400 Bad Request"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"HTTP/1.0 400 Bad Request"),
        (b"GET / HTTP/1.1\r\na: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n", b""),
    ],
    ids=["method", "no text", "no version", "too many headers", "too long"],
)
async def test_what_is_no_scrape_is_refused(request_bytes, status):
    async with serving_metrics() as (_, port):
        assert (await exchange(port, request_bytes))[0] == status
        assert (await exchange(port, SCRAPE))[0] == b"HTTP/1.0 200 OK"


async def test_a_client_that_sends_no_whole_request_is_cut_off_in_time():
    async with serving_metrics(exchange_s=0.05) as (server, port):
        assert await exchange(port, b"GET /metrics HTTP/1.1\r\n") == (b"", b"")
        await eventually(lambda: server.num_connections == 0)


async def test_clients_that_wait_cost_no_threads_and_keep_nobody_out():
    async with serving_metrics(exchange_s=3600) as (server, port):
        threads = threading.active_count()
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MAX_CONNECTIONS + 8)]
        for reader, _ in idle[:8]:
            await eventually(reader.at_eof, timeout_s=5)  # the oldest are closed
        assert (await exchange(port, SCRAPE))[0] == b"HTTP/1.0 200 OK"
        assert threading.active_count() <= threads + 1, "one thread makes all answers"
        assert server.num_connections <= MAX_CONNECTIONS
        for _, writer in idle:
            writer.close()


async def test_a_server_serves_its_metrics_and_frees_the_port_at_its_end(start):
    port = free_port()
    for _ in range(2):
        async with start(runtime="simulated", metrics_port=port):
            status, body = await exchange(port, SCRAPE)
            assert status == b"HTTP/1.0 200 OK"
            assert b"safelight_waiting_outputs" in body


async def test_metrics_have_an_address_of_their_own(start):
    port = free_port()
    async with start(runtime="simulated", metrics_port=port, metrics_host="127.0.0.2"):
        reader, writer = await asyncio.open_connection("127.0.0.2", port)
        writer.write(SCRAPE)
        assert (await reader.readline()).startswith(b"HTTP/1.0 200")
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
