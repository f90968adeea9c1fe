"""The arithmetic of `safelight plan`, and the command with its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.cli.main import app
from safelight_server.cli.planning import CallTimes, ModelTimes, PlannedLoad, expect, replicas
from typer.testing import CliRunner

LINEAR = ModelTimes(CallTimes((1, 64), (0.021, 0.084)), 0.0, 0.0)
TIMES = {"icons": LINEAR}


def load(images_per_s: float, rows: int = 1) -> PlannedLoad:
    return PlannedLoad("icons", images_per_s, 20, rows)


def test_times_between_those_measured_are_interpolated_and_larger_batches_take_several_calls() -> None:
    times = LINEAR.denoiser
    assert times.at(1) == 0.021
    assert times.at(32.5) == pytest.approx(0.0525)
    assert times.at(128) == pytest.approx(2 * 0.084)
    assert times.rows_per_s == pytest.approx(64 / 0.084)


def test_outputs_at_once_and_the_time_of_a_step_agree_by_littles_law() -> None:
    found = expect([load(10.0)], TIMES, 1.0)
    assert found.outputs == pytest.approx(10.0 * 20 * found.step_s)
    assert found.step_s == pytest.approx(LINEAR.denoiser.at(found.outputs))
    assert found.utilization == pytest.approx(10.0 * 20 / (64 / 0.084))


def test_guidance_needs_as_many_rows_again() -> None:
    assert expect([load(5.0, rows=2)], TIMES, 1.0).utilization == pytest.approx(
        expect([load(10.0)], TIMES, 1.0).utilization
    )


def test_an_instance_that_cannot_keep_up_has_no_end() -> None:
    assert math.isinf(expect([load(40.0)], TIMES, 1.0).first_preview_p99_s)


def test_models_take_turns() -> None:
    both = [load(1.0), PlannedLoad("other", 1.0, 20, 1)]
    one, two = expect([load(2.0)], TIMES, 1.0), expect(both, TIMES | {"other": LINEAR}, 1.0)
    assert two.step_s > 1.5 * one.step_s, "two calls of few rows in place of one"


def test_replicas_are_the_fewest_that_meet_throughput_and_latency() -> None:
    found = replicas([load(100.0)], TIMES, 1, 0.8, 0.1, 1)
    assert found is not None
    assert found.for_throughput == math.ceil(100 * 20 / (64 / 0.084) / 0.8)
    assert found.for_latency > found.for_throughput
    assert found.count == found.for_latency + 1
    assert found.expected.first_preview_p99_s <= 0.1
    fewer = expect([load(100.0)], TIMES, 1 / (found.for_latency - 1))
    assert fewer.first_preview_p99_s > 0.1


def test_a_target_below_a_single_step_is_met_by_no_number() -> None:
    assert replicas([load(1.0)], TIMES, 1, 0.8, 0.01, 0) is None


@given(st.floats(0.01, 500), st.integers(1, 8), st.floats(0.06, 5))
def test_more_replicas_are_never_slower(images_per_s: float, instances: int, target_s: float) -> None:
    found = replicas([load(images_per_s)], TIMES, instances, 0.8, target_s, 0)
    if found is not None:
        assert found.expected.utilization <= 0.8 + 1e-9
        assert found.expected.first_preview_p99_s <= target_s


PRICES = (
    'currency = "USD"\n[instance_types.small]\nper_hour = 1.0\n[instance_types.large]\nper_hour = 8.0\ninstances = 8\n'
)
MODEL = {
    "name": "models/icons",
    "isDefault": True,
    "defaults": {"numInferenceSteps": 20, "guidanceScale": 5.0},
    "stepTimes": [{"numRows": 1, "duration": "0.021s"}, {"numRows": 64, "duration": "0.084s"}],
    "componentTimes": [{"component": "decoder", "times": [{"numRows": 1, "duration": "0.002s"}]}],
}


class Desk:
    """Runs the command on files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("prices.toml", PRICES)
        self.write("curves.json", json.dumps({"models": [MODEL]}))
        self.write("load.toml", "first_preview_p99_s = 0.5\n[[mix]]\nimages_per_s = 20\ncached = 0.5\n")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def plan(self, *options: str, types: tuple[str, ...] = ("small", "large")) -> tuple[str, BaseException | None]:
        curves = [part for one in types for part in ("--curves", f"{one}={self.folder / 'curves.json'}")]
        files = [str(self.folder / "load.toml"), "--prices", str(self.folder / "prices.toml")]
        done = CliRunner().invoke(app, ["plan", *files, *curves, *options])
        return done.output, done.exception


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_the_plan_shows_its_arithmetic_and_the_cheapest_machine(desk: Desk) -> None:
    text, fault = desk.plan()
    assert fault is None, text
    assert "10 pictures/s x 20 steps x 2 rows = 400 rows/s" in text, "half is cached, and guidance is the default's"
    assert "10 x 2.0 ms = 0.02 for the rest" in text
    assert "cheapest: 2 x small, USD 2.00 an hour" in text


def test_a_guidance_interval_needs_fewer_rows(desk: Desk) -> None:
    desk.write("load.toml", "[[mix]]\nimages_per_s = 10\nguidance_interval = [0.2, 0.8]\n")
    text, fault = desk.plan()
    assert fault is None, text
    assert "10 pictures/s x 20 steps x 1.6 rows = 320 rows/s" in text


def test_the_plan_as_json(desk: Desk) -> None:
    text, fault = desk.plan("--json")
    assert fault is None, text
    found = json.loads(text)
    assert found["currency"] == "USD"
    assert [(one["instance_type"], one["replicas"]) for one in found["options"]] == [("small", 2), ("large", 2)]


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("load.toml", "[[mix]]\nimages_per_s = 0\n", "mix.0.images_per_s"),
        ("load.toml", "mix = []\n", "mix"),
        ("load.toml", "[[mix]]\nimages_per_s = 1\nmodel = 'none'\n", "mix.0.model: none is none of"),
        ("load.toml", "[[mix]]\nimages_per_s = 1\nguidance_interval = [0.8, 0.1]\n", "mix.0.guidance_interval"),
        ("load.toml", "first_preview_p99_s = 0.001\n[[mix]]\nimages_per_s = 1\n", "first_preview_p99_s"),
        ("curves.json", "{}", "is not what `safelight models --json` prints"),
        ("curves.json", json.dumps({"models": [MODEL | {"stepTimes": []}]}), "no times of calls of one row"),
        ("prices.toml", "", "currency"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_fault(desk: Desk, file: str, text: str, fault: str) -> None:
    desk.write(file, text)
    _, error = desk.plan()
    assert error is not None and fault in str(error)


def test_a_machine_without_a_price_is_refused(desk: Desk) -> None:
    _, error = desk.plan(types=("medium",))
    assert "'medium' is none of the instance types ['large', 'small']" in str(error)
