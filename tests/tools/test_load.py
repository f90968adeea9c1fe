"""The load tests run: every scenario of ghz and Locust's users, for seconds, against the runtimes in this process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from safelight_server.api.identity import new_key
from safelight_server.telemetry.figures import by_label

from load_tests.ghz.run import SCENARIOS
from tests.conftest import Start
from tests.support.certificates import self_signed
from tests.tools.test_tools import messages
from tests.triton.support import ROOT

RUNTIMES = {"embedded": {}, "simulated": {"runtime": "simulated", "simulated_base_ms": 20.0}}


async def printed(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Runs a command, which must succeed, in the root of the repository, and returns its output."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=os.environ | (env or {}), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, out.decode() + err.decode()
    return out.decode()


async def ghz(address: str, out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Runs ghz' scenarios; returns the table, and the reports by scenario."""
    command = [sys.executable, "-m", "load_tests.ghz.run", "--target", address, "--out", str(out), *arguments]
    text = await printed(*command)
    return text, reports(out)


def reports(folder: Path) -> dict[str, Any]:
    """Reads the reports by scenario."""
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_ghz_runs_every_scenario(start: Start, tmp_path: Path, runtime: str) -> None:
    async with start(**RUNTIMES[runtime]) as running:
        text, found = await ghz(running.address, tmp_path, "--time-scale", "0.03")
    assert set(found) == set(SCENARIOS)
    assert all(scenario in text for scenario in SCENARIOS)
    assert set(found["cancel-storm"]["statusCodeDistribution"]) == {"Canceled"}


async def test_ghz_starts_a_server_where_it_is_told_to(tmp_path: Path) -> None:
    serve = ("--serve", "simulated", "--only", "steady", "--time-scale", "0.01", "--out", str(tmp_path))
    text = await printed(sys.executable, "-m", "load_tests.ghz.run", *serve)
    assert "steady" in text
    assert set(reports(tmp_path)["steady"]["statusCodeDistribution"]) == {"OK"}


async def test_ghz_reads_slowly_where_a_scenario_says_so(start: Start, tmp_path: Path) -> None:
    async with start(runtime="simulated", simulated_base_ms=1.0) as running:
        _, found = await ghz(running.address, tmp_path, "--only", "slow-readers", "--time-scale", "0.001")
    picture_bytes, bytes_per_second = 128 * 128 * 4, 20_000
    assert found["slow-readers"]["fastest"] >= 1e9 * picture_bytes / bytes_per_second  # the relay's rate


async def test_a_request_id_that_ghz_sends_again_runs_once(start: Start, tmp_path: Path) -> None:
    async with start(runtime="simulated", simulated_base_ms=1.0) as running:
        scenario = ("--only", "idempotent-retries", "--time-scale", "0.05")
        _, found = await ghz(running.address, tmp_path, *scenario)
        outcomes = by_label(running.generations._metrics._outcomes, "status")
        [(status, count)] = [(status, count) for status, count in outcomes.items() if count]
    assert status == "OK"
    assert 1 < count <= found["idempotent-retries"]["count"] / 3 + 2  # the first and the last id are sent fewer times


async def test_ghz_sends_a_key_over_tls_and_does_not_report_it(start: Start, tmp_path: Path) -> None:
    cert, private = self_signed(tmp_path, "safelight.example")
    key, record = new_key("tester", "studio")
    (tmp_path / "keys.json").write_text(f'{{"keys": [{record}]}}')
    settings = {"tls_cert_file": cert, "tls_key_file": private, "api_key_file": tmp_path / "keys.json"}
    async with start(runtime="simulated", simulated_base_ms=1.0, **settings) as running:
        how = ("--ca-file", str(cert), "--server-name", "safelight.example", "--api-key", key)
        for scenario in ("steady", "slow-readers"):
            _, found = await ghz(running.address, tmp_path / "out", *how, "--only", scenario, "--time-scale", "0.02")
            assert set(found[scenario]["statusCodeDistribution"]) == {"OK"}
    assert key not in "".join(file.read_text() for file in (tmp_path / "out").iterdir())


USERS = (".venv-locust/bin/locust", "-f", "load_tests/locust/locustfile.py", "--headless", "--skip-log", "--json")


async def locust(address: str, *arguments: str) -> dict[str, int]:
    """Runs Locust; returns the number of measurements of each metric. A failed request fails the command."""
    command = (ROOT / USERS[0], *USERS[1:], "--host", address, "--spawn-rate", "10", *arguments)
    text = await printed(*command, env={"PYTHONPATH": f"{ROOT / 'clients/python'}:{ROOT}"})
    rows = max(messages(text), key=len)  # the workers of --processes also print a list, of unreported rows
    return {row["name"]: row["num_requests"] for row in rows}


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_users_measure_what_people_notice(start: Start, tmp_path: Path, runtime: str) -> None:
    (tmp_path / "prompts").write_text("a red potion\n")
    async with start(**RUNTIMES[runtime]) as running:
        alike = ("--prompts", str(tmp_path / "prompts"), "--seeds", "1", "--cancels", "0", "--think", "0.5")
        length = ("--run-time", "4s", "--stop-timeout", "60")  # waits for pictures that have begun
        counts = await locust(running.address, "--users", "4", *length, *alike)
    assert counts["first recognisable preview"] == counts["picture (computed)"] == 1
    assert counts["picture (cached)"] > 0
    assert counts["first preview"] > 0
    assert counts["preview gap"] > 0
    assert "cancel" not in counts


async def test_users_cancel_as_often_as_they_are_told(start: Start) -> None:
    async with start(runtime="simulated", simulated_base_ms=50.0) as running:
        length = ("--run-time", "4s", "--stop-timeout", "20", "--processes", "2", "--think", "0.5")
        asked = ("--cancels", "1", "--steps", "200")  # so many that each user cancels before the end
        counts = await locust(running.address, "--users", "4", *length, *asked)
    assert counts["cancel"] > 0
    assert counts["first preview"] >= counts["cancel"]
    assert "picture (computed)" not in counts


async def test_users_take_refusals_for_what_they_are_and_use_their_own_prompts(start: Start, tmp_path: Path) -> None:
    cert, private = self_signed(tmp_path, "safelight.example")
    key, record = new_key("tester", "studio")
    (tmp_path / "keys.json").write_text(f'{{"keys": [{record}]}}')
    (tmp_path / "quotas.json").write_text('{"default": {"requests": {"per_s": 1, "burst": 1}}}')
    (tmp_path / "prompts").write_text("a red potion\n")
    files = {"tls_cert_file": cert, "tls_key_file": private, "api_key_file": tmp_path / "keys.json"}
    files["quota_file"] = tmp_path / "quotas.json"
    async with start(runtime="simulated", simulated_base_ms=1.0, **files) as running:
        how = ("--ca-file", str(cert), "--server-name", "safelight.example", "--api-key", key)
        asked = ("--prompts", str(tmp_path / "prompts"), "--steps", "2", "--cancels", "0", "--think", "0")
        counts = await locust(running.address, "--users", "3", "--run-time", "4s", "--stop-timeout", "10", *how, *asked)
    assert counts["refused REQUEST_RATE_EXCEEDED"] > 0
    assert counts["picture (computed)"] > 0
    assert "cancel" not in counts
    assert "preview gap" not in counts, "two steps have one preview"
