"""Runs every dashboard's queries on a real Prometheus that scrapes a real server, and Triton if it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safelight import Client, GenerationError
from safelight.v1 import generation_pb2 as pb
from safelight_server.api.identity import new_key
from safelight_server.storage.keyring import write_key_file

from load_tests.ports import free_port
from tests.conftest import serving_here
from tests.support.http import client as http_client
from tests.support.prometheus_server import PrometheusServer, prometheus
from tests.triton.support import PYTHON as TRITON_PYTHON
from tests.triton.support import TritonServer

ROOT = Path(__file__).parent.parent.parent
BOARDS = sorted((ROOT / "deploy/grafana").glob("*.json"))
DCGM = Path(__file__).with_name("dcgm_exporter.txt").read_bytes()
"""What dcgm-exporter answers, by its documentation: two GPUs of a pod of ours and one of another pod."""
NO_WEEK = "compares with the weeks before, which a test does not have; test_seasons and promtool's tests ask it"
NO_JUDGE = "needs a CLIP, which the training environment makes: tests/training/test_judge.py measures with one"
NO_TRITON = "Triton is not installed: make .venv-triton/.installed"
EMPTY = {
    "job:safelight_requests_season:": NO_WEEK,
    ":drift": NO_WEEK,
    "safelight_prompt_agreement": NO_JUDGE,
}
"""Parts of queries that return nothing here, and why."""
WAIT_S = 150.0
TENANTS = ("studio", "lab")
CONFIG = """
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [RULES]
scrape_configs:
  - job_name: safelight
    static_configs: [{targets: ["127.0.0.1:PORT"], labels: {namespace: default, pod: safelight-0}}]
  - job_name: dcgm-exporter
    honor_labels: true
    static_configs: [{targets: ["127.0.0.1:DCGM"]}]
"""
OF_TRITON = """
  - job_name: triton
    static_configs: [{targets: ["127.0.0.1:PORT"], labels: {namespace: default, pod: safelight-0}}]
"""


@contextlib.contextmanager
def dcgm_exporter() -> Iterator[int]:
    """Answers scrapes with the fixture, in the place of dcgm-exporter; the port."""

    class Exporter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("content-length", str(len(DCGM)))
            self.end_headers()
            self.wfile.write(DCGM)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Exporter) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def queries(board: Path) -> list[tuple[str, str]]:
    """Titles and queries of a dashboard, as Grafana would send them."""
    found = []
    for panel in json.loads(board.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$job", "safelight").replace("$__rate_interval", "15s")
            assert "$" not in query, query
            found.append((panel["title"], query))
    return found


@dataclass
class Watched:
    """A server with keys for its tenants, and the Prometheus that scrapes it."""

    prometheus: PrometheusServer
    triton: bool


def rules_for_tests(folder: Path) -> str:
    """Writes the rules with the test's interval; returns the pattern of their files."""
    (folder / "rules").mkdir()
    for file in (ROOT / "deploy/prometheus").glob("*.yml"):
        if file.name != "prometheus.yml":
            (folder / "rules" / file.name).write_text(re.sub(r"\n +interval: \w+", "", file.read_text()))
    return str(folder / "rules/*.yml")


@contextlib.contextmanager
def triton_with_metrics(folder: Path) -> Any:
    """A real Triton and the port of its metrics; None if it is not installed."""
    if not TRITON_PYTHON.exists():
        yield None
        return
    port = free_port()
    triton = TritonServer(folder, "--metrics-port", str(port))
    triton.start()
    try:
        triton.wait_ready()
        yield triton.grpc_url, port
    finally:
        triton.supervisor.terminate()
        triton.supervisor.wait(20)


@contextlib.asynccontextmanager
async def watched(folder: Path) -> AsyncIterator[tuple[Watched, Any]]:
    made = {name: new_key(name, name) for name in TENANTS}
    (folder / "keys.json").write_text(f'{{"keys": [{", ".join(entry for _, entry in made.values())}]}}')
    (folder / "quotas.json").write_text('{"tenants": {"lab": {"requests": {"per_s": 0.01, "burst": 1}}}}')
    (folder / "prices.toml").write_text('currency = "EUR"\n[instance_types.test]\nper_hour = 3.6\n')
    write_key_file(folder / "cache.keys")
    with triton_with_metrics(folder) as triton, dcgm_exporter() as dcgm_port:
        port = free_port()
        settings: dict[str, object] = {"runtime": "simulated", "simulated_base_ms": 5.0}
        if triton is not None:
            settings = {"runtime": "triton", "triton_url": triton[0], "triton_start_s": 60.0}
        settings |= {
            "metrics_port": port,
            "http_port": free_port(),
            "api_key_file": folder / "keys.json",
            "quota_file": folder / "quotas.json",
            "cache_key_file": folder / "cache.keys",
            "cache_disk_dir": folder / "disk",
            "price_file": folder / "prices.toml",
            "instance_type": "test",
            "quality_sample_ratio": 1.0,
        }
        config = (
            CONFIG.replace("RULES", rules_for_tests(folder)).replace("PORT", str(port)).replace("DCGM", str(dcgm_port))
        )
        if triton is not None:
            config += OF_TRITON.replace("PORT", str(triton[1]))
        async with serving_here(**settings) as running:
            with prometheus(folder, config) as server:
                clients = {name: Client(running.address, api_key=key, retries=0) for name, (key, _) in made.items()}
                key = {"authorization": f"Bearer {made[TENANTS[0]][0]}"}
                load = asyncio.create_task(ask_again_and_again(clients, running.http_address, key))
                try:
                    yield Watched(server, triton is not None), load
                finally:
                    load.cancel()
                    await asyncio.gather(load, return_exceptions=True)
                    for client in clients.values():
                        await client.close()


async def ask_again_and_again(clients: dict[str, Client], http_address: str, key: dict[str, str]) -> None:
    """A little load: new pictures, repeated ones, similar ones, requests beyond a quota, and HTTP."""
    number = 0
    async with http_client_of(http_address) as http:
        while True:
            number += 1
            options: dict[str, Any] = {"steps": 4, "priority": pb.PRIORITY_INTERACTIVE}
            await clients["studio"].generate("a red potion", seed=number, **options).pictures()
            await clients["studio"].generate("a red potion", seed=1, cache="similar", **options).pictures()
            with contextlib.suppress(GenerationError):
                await clients["lab"].generate("a blue potion", seed=number, steps=2).pictures()
            await http.get("/v1/models", headers=key)
            await asyncio.sleep(0.2)


def http_client_of(address: str) -> Any:
    class Address:
        http_address = address

    return http_client(Address())  # type: ignore[arg-type]


@pytest.mark.timeout(300)
async def test_every_query_of_every_dashboard_returns_data(tmp_path: Path) -> None:
    asked = [(board.stem, title, query) for board in BOARDS for title, query in queries(board)]
    assert len(asked) > 60
    async with watched(tmp_path) as (seen, load):
        empty = dict(EMPTY) if seen.triton else EMPTY | {"nv_": NO_TRITON}
        missing = [one for one in asked if not any(part in one[2] for part in empty)]
        until = time.monotonic() + WAIT_S
        while missing and time.monotonic() < until:
            assert not load.done(), load.result()
            found = [await asyncio.to_thread(seen.prometheus.ask, query) for _, _, query in missing]
            missing = [one for one, samples in zip(missing, found, strict=True) if not samples]
            await asyncio.sleep(0.5)
        assert not missing, "these return nothing, and EMPTY does not say why:\n" + "\n".join(map(str, missing))
        gpus = [query for _, _, query in asked if "group_left" in query and "DCGM_FI_DEV_POWER" in query]
        shown = [await asyncio.to_thread(seen.prometheus.ask, query) for query in gpus]
        assert [{sample["metric"]["pod"] for sample in samples} for samples in shown] == [{"safelight-0"}]
        for _, _, query in asked:  # these queries must be valid too
            await asyncio.to_thread(seen.prometheus.ask, query)
        assert all(any(part in query for _, _, query in asked) for part in EMPTY), "EMPTY excuses what nobody asks"
