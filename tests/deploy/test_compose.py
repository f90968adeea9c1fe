"""Tests deploy/compose.yaml without a Compose engine: its schema, and each service's command.

The commands run in a network namespace of this test (`make test-deploy`), in which every service's name resolves to
loopback; only paths of volumes are replaced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from safelight import SyncClient

ROOT = Path(__file__).parent.parent.parent
COMPOSE = ROOT / "deploy" / "compose.yaml"
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
PROGRAMS: dict[str, list[str]] = {
    "gateway": [str(ROOT / ".venv/bin/safelight")],
    "triton": [str(ROOT / ".venv-triton/bin/python"), str(ROOT / "deploy/triton/serve"), "--restart"],
    "redis": [],
    "jaeger": [str(ROOT / ".tools/all-in-one")],
    "prometheus": ["prometheus"],
}
"""The entry point of each service's image."""
READY_S = 90.0


def at_home(text: str, paths: dict[str, Path]) -> str:
    """Replaces names of services and paths in a word of the file by those of this machine."""
    for name in SERVICES:
        text = (
            text.replace(f"//{name}:", "//127.0.0.1:")
            .replace(f"{name}:8", "127.0.0.1:8")
            .replace(f"{name}:9", "127.0.0.1:9")
        )
    for path, here in paths.items():
        text = text.replace(path, str(here))
    return text


@contextmanager
def running(name: str, paths: dict[str, Path], log: Path) -> Iterator[None]:
    """Runs a service's command during the block."""
    service = SERVICES[name]
    command = [*PROGRAMS[name], *(at_home(word, paths) for word in service.get("command", []))]
    variables = {key: at_home(value, paths) for key, value in service.get("environment", {}).items()}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=output, stderr=output, cwd=ROOT)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(40)
            finally:
                process.kill()


def until(what: str, condition: Callable[[], object]) -> None:
    end = time.monotonic() + READY_S
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < end, f"not within {READY_S:.0f} s: {what}"
        time.sleep(0.2)


def page(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def test_it_is_valid_by_the_schema_of_compose():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_nothing_is_published_beyond_loopback_and_nothing_runs_with_privileges():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    assert "ports" not in SERVICES["triton"]
    assert SERVICES["gateway"]["ipc"] == "service:triton"


@pytest.mark.timeout(400)
def test_the_commands_make_a_picture_a_trace_and_metrics(tmp_path):
    assert os.environ.get("SAFELIGHT_TEST_NETWORK") == "unshared", "run these tests with `make test-deploy`"
    keys = tmp_path / "cache.keys"
    subprocess.run([*PROGRAMS["gateway"], "keys", "cache", keys], check=True, stdout=subprocess.DEVNULL)
    scrape = tmp_path / "prometheus.yml"
    configuration = (COMPOSE.parent / "compose" / "prometheus.yml").read_text()
    scrape.write_text(at_home(configuration, {}))
    (tmp_path / "redis").mkdir()
    paths = {
        "/run/secrets/cache-key": keys,
        "/etc/prometheus/prometheus.yml": scrape,
        "=/prometheus": Path(f"={tmp_path / 'prometheus'}"),
        "/data": tmp_path / "redis",
    }
    with ExitStack() as services:
        for name in ("redis", "jaeger", "triton", "prometheus"):
            services.enter_context(running(name, paths, tmp_path / f"{name}.log"))
        ready = "http://127.0.0.1:8000/v2/health/ready"
        until("Triton is ready", lambda: urllib.request.urlopen(ready, timeout=5))
        services.enter_context(running("gateway", paths, tmp_path / "gateway.log"))
        until("the gateway is healthy", lambda: urllib.request.urlopen("http://127.0.0.1:8080/healthz", timeout=5))
        with SyncClient("127.0.0.1:8421") as client:
            assert client.generate("a red potion", seed=7).image().size == (128, 128)
            assert client.models()[0].runtime == "triton"

        def found(query: str) -> Any:
            return page(f"http://127.0.0.1:9090/api/v1/query?query={query}")["data"]["result"]

        until("both are scraped", lambda: [each["value"][1] for each in found("up")] == ["1", "1"])
        until("metrics of the gateway are there", lambda: found("safelight_waiting_outputs"))
        jaeger = "http://127.0.0.1:16686/api/services"
        until("both have sent spans", lambda: {"safelight", "triton"} <= set(page(jaeger)["data"] or []))
