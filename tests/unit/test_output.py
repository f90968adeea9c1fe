"""Outputs, as far as they need no execution."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from safelight_server.output import Output

from tests.support.streams import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def output(clock):
    nothing = SimpleNamespace(on_started=lambda: None, on_stepped=lambda output, batch_size: None)
    return Output(nothing, 0, 1, clock)


def step(output, clock, steps, seconds):
    clock.now += seconds
    output.stepped(output.step + steps, 1)


def test_the_pace_is_that_of_the_steps_it_has_seen(output, clock):
    clock.now = 100.0  # it has waited for its place
    output.started()
    step(output, clock, 2, 4.0)
    assert output.pace_s == 2.0


def test_steps_that_were_made_before_it_came_do_not_count(output, clock):
    """Whether it starts from another's latent, or joins an identical output that is on its way."""
    clock.now = 100.0
    output.joined(15, None)
    clock.now = 110.0
    output.started()
    step(output, clock, 1, 3.0)
    assert output.pace_s == 3.0


def test_nor_does_the_time_in_which_it_was_suspended(output, clock):
    output.started()
    step(output, clock, 5, 5.0)
    clock.now += 1000.0
    output.joined(5, None)
    output.started()
    step(output, clock, 2, 4.0)
    assert output.pace_s == 2.0
