"""The cost of a generation, and a plan from the times that a running server reports."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from safelight import Client, Finished
from safelight.v1 import generation_pb2 as pb
from safelight_server.cli.main import app
from safelight_server.files import ConfigFileError
from typer.testing import CliRunner

from tests.conftest import serving_here
from tests.integration.test_cache import kept
from tests.support.http import GENERATIONS, body, client, http_server

SIMULATED = {"runtime": "simulated", "num_instances": 1, "simulated_base_ms": 3.0}
PRICES = 'currency = "EUR"\n[instance_types.small]\nper_hour = 7.2\ninstances = 2\nutilization = 0.5\n'
NANOS_PER_S = 2_000_000
"""7.2 / 3600 / 2 / 0.5 = 0.002 EUR."""


async def finished(client: Client, **options: object) -> Finished:
    *_, last = [event async for event in client.generate("a red potion", seed=1, steps=3, **options)]  # type: ignore[arg-type]
    assert isinstance(last, Finished)
    return last


async def test_a_generation_costs_its_compute_and_what_the_cache_serves_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    async with (
        serving_here(**SIMULATED, price_file=tmp_path / "prices.toml", instance_type="small") as running,
        Client(running.address) as client,
    ):
        usage = (await finished(client)).usage
        compute_s = usage.compute_time.ToNanoseconds() / 1e9
        assert usage.cost.currency_code == "EUR"
        assert usage.cost.nanos == pytest.approx(compute_s * NANOS_PER_S, abs=2) and compute_s > 0
        await kept(running)
        assert (await finished(client)).usage.cost == pb.Cost(currency_code="EUR", nanos=0)


async def test_the_cost_is_in_the_answer_over_http(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    settings = {"price_file": tmp_path / "prices.toml", "instance_type": "small"}
    async with http_server(**settings) as running, client(running) as http:
        answer = (await http.post(GENERATIONS, json=body())).json()["safelight"]
    assert answer["cost"]["currency"] == "EUR"
    assert answer["cost"]["nanos"] == pytest.approx(answer["compute_seconds"] * NANOS_PER_S, abs=3)


async def test_without_a_price_there_is_no_cost() -> None:
    async with serving_here(**SIMULATED) as running, Client(running.address) as client:
        assert not (await finished(client)).usage.HasField("cost")


async def test_a_machine_that_has_no_price_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    with pytest.raises(ConfigFileError, match="instance_type: 'large' is none of"):
        async with serving_here(**SIMULATED, price_file=tmp_path / "prices.toml", instance_type="large"):
            pass


async def test_a_plan_from_what_a_server_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    (tmp_path / "load.toml").write_text("[[mix]]\nimages_per_s = 1000\n")
    async with serving_here(**SIMULATED) as running:
        said = await asyncio.to_thread(CliRunner().invoke, app, ["models", "--json", "--target", running.address])
    (tmp_path / "small.json").write_text(said.output)
    files = [str(tmp_path / "load.toml"), "--prices", str(tmp_path / "prices.toml")]
    planned = CliRunner().invoke(app, ["plan", *files, "--curves", f"small={tmp_path / 'small.json'}"])
    assert "1000 pictures/s x 20 steps x 1 rows = 20000 rows/s" in planned.output
    # 3 ms and 1 ms a row: 64 rows in 67 ms; text encoder and decoder: a tenth of 4 ms each
    assert "an instance makes 955.2 rows/s at most; 20000 / 955.2 = 20.94 instances for steps" in planned.output
    assert "1000 x 0.8 ms = 0.80 for the rest" in planned.output
    assert "cheapest: 15 x small" in planned.output, "(20.94 + 0.80) / 0.8 / 2 = 13.6, and a spare one"
