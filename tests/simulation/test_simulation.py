"""Some hundred schedules each time; `make test-simulation` runs a hundred thousand."""

from __future__ import annotations

import gc

import pytest

from tests.simulation.schedule import collect, run, run_many


@pytest.mark.timeout(120)
def test_every_invariant_holds() -> None:
    failed = run_many(1, 200)
    assert not failed, "\n".join(f"seed {result.seed}: {what}" for result in failed for what in result.wrong)


@pytest.mark.parametrize("seed", [4, 33, 52])
def test_a_seed_replays_exactly(seed: int) -> None:
    collect()
    gc.disable()  # a collection amid a schedule would run what an earlier one has left
    try:
        one, other = run(seed, trace=True), run(seed, trace=True)
        collect()
    finally:
        gc.enable()
    assert one.trace == other.trace and one.wrong == other.wrong
