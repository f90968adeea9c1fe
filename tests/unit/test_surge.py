"""A surge on a virtual clock: who comes back when it was told is let in, and first previews come soon."""

from __future__ import annotations

import pytest
from safelight.v1 import generation_pb2 as pb
from safelight_server.runtime.simulated import OTHERS

from load_tests.bench.surge import BASE_MS, ROW_MS, RUNNING, Outcome, Plan, class_row, phase_row
from load_tests.bench.surge_simulation import Variant, simulate

PLAN = Plan(warmup_s=2.0, before_s=10.0, surge_s=40.0, after_s=10.0)
LET_IN = 0.9


def let_in(outcomes: list[Outcome]) -> dict[int, float]:
    """Of those who came back, the share that was let in then, by class."""
    rows = {priority: class_row(priority, outcomes) for priority in (pb.PRIORITY_STANDARD, pb.PRIORITY_BATCH)}
    assert all(int(row["asked_again"]) > 50 for row in rows.values()), "else this shows nothing"
    return {priority: float(row["let_in_then_share"]) for priority, row in rows.items()}


@pytest.fixture(scope="module")
def surge() -> list[Outcome]:
    return simulate(PLAN)


def test_who_comes_back_in_time_is_let_in(surge: list[Outcome]) -> None:
    assert min(let_in(surge).values()) >= LET_IN
    assert all(outcome.admitted for outcome in surge)


def test_a_first_preview_waits_for_one_call_at_most_before_its_own(surge: list[Outcome]) -> None:
    """A full call of steps that is under way, one of another component, and the full call that has the first step."""
    full_ms = BASE_MS + ROW_MS * RUNNING
    assert float(phase_row("surge", surge, PLAN)["interactive_first_ms_p99"]) <= (2 + OTHERS) * full_ms


def test_so_is_who_comes_late() -> None:
    assert min(let_in(simulate(PLAN, Variant(lateness=0.2))).values()) >= LET_IN


def test_so_is_who_asks_for_four_at_once() -> None:
    assert min(let_in(simulate(PLAN, Variant(num_outputs=4))).values()) >= LET_IN
