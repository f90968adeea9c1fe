"""ghz scenarios: how they are scaled, and which statuses are unexpected."""

from __future__ import annotations

import json

import pytest

from load_tests.ghz import run


def test_there_is_a_file_for_each_scenario_and_no_other():
    assert {file.stem for file in run.FOLDER.glob("*.json")} == set(run.SCENARIOS)


@pytest.mark.parametrize("scenario", run.SCENARIOS)
def test_a_scenario_is_named_for_its_file_and_expects_something(scenario):
    config = json.loads((run.FOLDER / f"{scenario}.json").read_text())
    assert config["name"] == scenario
    assert set(config["tags"]["expect"].split(",")) <= {"OK", run.REFUSED, run.TOO_LATE, run.CANCELLED}


def test_a_burst_is_five_times_the_steady_rate_for_two_minutes():
    steady, burst, recovery = (
        json.loads((run.FOLDER / f"{name}.json").read_text()) for name in ("steady", "burst", "recovery")
    )
    assert burst["rps"] == 5 * steady["rps"] == 5 * recovery["rps"]
    assert burst["duration"] == "120s"


def test_scales_durations_and_rates_and_nothing_else():
    config = {"rps": 10, "load-step": 1, "duration": "60s", "load-step-duration": "2.5s", "timeout": "60s", "name": "x"}
    assert run.scaled(config, time_scale=0.1, rate_scale=0.25) == config | {
        "rps": 2, "load-step": 1, "duration": "6.000s", "load-step-duration": "0.250s",
    }  # fmt: skip


def test_statuses_that_a_scenario_does_not_expect_are_named_and_so_is_silence():
    report = {"name": "burst", "tags": {"expect": "OK,ResourceExhausted"}}
    fine = {"OK": 3, "ResourceExhausted": 5}
    assert run.unexpected(report | {"statusCodeDistribution": fine}) == []
    assert run.unexpected(report | {"statusCodeDistribution": fine | {"Unavailable": 2}}) == [
        "burst: 2 calls ended with Unavailable"
    ]
    assert run.unexpected(report | {"statusCodeDistribution": {}}) == ["burst: no call has ended"]
