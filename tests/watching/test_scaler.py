"""Tests of `safelight scaler` with KEDA's calls, on a real Prometheus that has weeks of history and scrapes a server."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import pytest
import pytest_asyncio
from safelight import Client
from safelight_server.app.server import Running
from safelight_server.scaler import externalscaler_pb2 as pb

from load_tests.ports import free_port
from tests.conftest import serving_here
from tests.support.prometheus_server import PrometheusServer, prometheus

pytestmark = pytest.mark.asyncio(loop_scope="module")
WAIT_S = 60.0
HISTORY_S = 17 * 86_400
FUTURE_REPLICAS = 12.0
"""Rate of the history (seconds of compute a second) in the hours around this time of each day; else it is a twelfth."""
CONFIG = """
global: {scrape_interval: 1s}
scrape_configs:
  - job_name: pictures
    static_configs: [{targets: ["127.0.0.1:PORT"]}]
"""


def history(now: float) -> str:
    """Two and a half weeks of a counter in OpenMetrics: busy for an hour and a half before and after this time of day."""
    lines, total = ["# TYPE safelight_requested_compute_seconds counter"], 0.0
    step_s, begin = 300, now - HISTORY_S
    for at in range(int(begin), int(now) - 3 * 3600, step_s):  # newer samples are in Prometheus' head block
        away_s = abs((at - now + 43_200) % 86_400 - 43_200)
        total += step_s * FUTURE_REPLICAS / (1 if away_s < 5400 else 12)
        lines.append(f'safelight_requested_compute_seconds_total{{class="standard",fleet="old"}} {total} {at}')
    return "\n".join([*lines, "# EOF", ""])


@pytest.fixture(scope="module")
def scraping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PrometheusServer, int]]:
    """A Prometheus with the history, and the port that it scrapes."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    (folder / "history.om").write_text(history(time.time()))
    blocks = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", "history.om", "data"]
    subprocess.run(blocks, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with prometheus(folder, CONFIG.replace("PORT", str(port))) as server:
        yield server, port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(scraping: tuple[PrometheusServer, int]) -> AsyncIterator[Running]:
    """Runs a server that needs 0.2 s for each step, on the scraped port."""
    async with serving_here(
        runtime="simulated", simulated_base_ms=200.0, num_instances=1, metrics_port=scraping[1]
    ) as running:
        yield running


@contextmanager
def scaler(url: str) -> Iterator[str]:
    """`safelight scaler` as a process; its address."""
    command = [sys.executable, "-m", "safelight_server", "scaler", "--prometheus", url, "--port", "0"]
    with subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield json.loads(process.stderr.readline())["address"]
        finally:
            process.terminate()
            assert process.wait(20) == 0


class Keda:
    """Calls a scaler as KEDA does."""

    def __init__(self, channel: grpc.aio.Channel, **metadata: str) -> None:
        self._channel = channel
        self.ref = pb.ScaledObjectRef(
            name="pictures", namespace="test", scalerMetadata={"scalerAddress": "x", **metadata}
        )

    def _method(self, name: str, asked: Any, answer: Any, kind: str = "unary_unary") -> Any:
        path = f"/externalscaler.ExternalScaler/{name}"
        return getattr(self._channel, kind)(path, asked.SerializeToString, answer.FromString)

    async def replicas(self) -> float:
        request = pb.GetMetricsRequest(scaledObjectRef=self.ref, metricName="replicas")
        values = await self._method("GetMetrics", pb.GetMetricsRequest, pb.GetMetricsResponse)(request)
        (value,) = values.metricValues
        assert (value.metricName, value.metricValue) == ("replicas", value.metricValueFloat)
        return float(value.metricValueFloat)

    async def spec(self) -> pb.GetMetricSpecResponse:
        return await self._method("GetMetricSpec", pb.ScaledObjectRef, pb.GetMetricSpecResponse)(self.ref)

    async def is_active(self) -> bool:
        answer = await self._method("IsActive", pb.ScaledObjectRef, pb.IsActiveResponse)(self.ref)
        return bool(answer.result)

    def stream(self) -> Any:
        return self._method("StreamIsActive", pb.ScaledObjectRef, pb.IsActiveResponse, "unary_stream")(self.ref)

    async def until(self, least: float) -> float:
        """Polls until the scaler needs at least this number of replicas."""
        end = time.monotonic() + WAIT_S
        while (now := await self.replicas()) < least:
            assert time.monotonic() < end, f"{now} replicas, not {least}"
            await asyncio.sleep(0.2)
        return now


@asynccontextmanager
async def keda(address: str, **metadata: str) -> AsyncIterator[Keda]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield Keda(channel, **metadata)


async def test_a_fleet_wakes_up_and_grows_with_its_queue(scraping, server):
    metadata = {"selector": 'job="pictures"', "forecast": "false", "waitStandard": "10"}
    with scaler(scraping[0].url) as address:
        async with keda(address, **metadata) as asks, Client(server.address) as client:
            assert [(one.metricName, one.targetSizeFloat) for one in (await asks.spec()).metricSpecs] == [
                ("replicas", 1.0)
            ]
            assert not await asks.is_active()
            stream = aiter(asks.stream())
            assert not (await anext(stream)).result
            asked = asyncio.create_task(client.generate("a red potion", steps=400, seed=1).picture())
            assert (await asyncio.wait_for(anext(stream), WAIT_S)).result
            # 400 steps of 0.2 s, of which 16 rows share one call of simulated time, are to be done within 10 s.
            assert await asks.until(1) <= math.ceil(400 * 0.2 / 10) + 1
            asked.cancel()


async def test_what_the_days_before_have_shown_is_needed_before_it_is_asked_for(scraping, server):
    with scaler(scraping[0].url) as address:
        async with keda(address, utilization="1", selector='fleet="old"') as asks:
            # At first from the same time of the last week, then from the fitted seasons; this time is busy in both.
            needed = await asks.until(FUTURE_REPLICAS * 0.75)
            assert needed <= FUTURE_REPLICAS * 1.25
        async with keda(address, utilization="1", selector='fleet="old"', forecast="false") as asks:
            assert await asks.replicas() == 0


@pytest.mark.parametrize(
    ("metadata", "code", "words"),
    [
        ({"utilization": "2"}, grpc.StatusCode.INVALID_ARGUMENT, "utilization: "),
        ({"selector": "job="}, grpc.StatusCode.UNAVAILABLE, "refuses sum by (class)"),
    ],
)
async def test_faults_are_named(scraping, metadata, code, words):
    with scaler(scraping[0].url) as address:
        async with keda(address, **metadata) as asks:
            with pytest.raises(grpc.aio.AioRpcError, match=words.replace("(", r"\(").replace(")", r"\)")) as refused:
                await asks.replicas()
            assert refused.value.code() is code


async def test_without_prometheus_nothing_is_said():
    with scaler(f"http://127.0.0.1:{free_port()}") as address:
        async with keda(address) as asks:
            with pytest.raises(grpc.aio.AioRpcError, match="cannot be reached") as refused:
                await asks.replicas()
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
