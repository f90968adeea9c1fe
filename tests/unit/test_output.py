"""Outputs, which link a generation with executions."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from safelight_server.domain.errors import InternalError
from safelight_server.generations.output import Output

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
    clock.now = 100.0  # it has waited in the queue
    output.started()
    step(output, clock, 2, 4.0)
    assert output.seconds_per_step == 2.0


def test_steps_that_were_made_before_it_came_do_not_count(output, clock):
    """Whether it starts from another output's latent, or joins an identical output that is being developed."""
    clock.now = 100.0
    output.joined(15)
    clock.now = 110.0
    output.started()
    step(output, clock, 1, 3.0)
    assert output.seconds_per_step == 3.0


def test_nor_does_the_time_in_which_it_was_suspended(output, clock):
    output.started()
    step(output, clock, 5, 5.0)
    clock.now += 1000.0
    output.joined(5)
    output.started()
    step(output, clock, 2, 4.0)
    assert output.seconds_per_step == 2.0


@pytest.fixture
def generation() -> Mock:
    return Mock(owned=True)


def end(output: Output, how: str) -> None:
    """Ends the output as an execution does."""
    output.failed(InternalError()) if how == "failed" else output.expired()


@pytest.mark.parametrize("how", ["failed", "expired"])
def test_what_ends_an_execution_is_heard_once(generation, clock, how):
    """The generation ends all its outputs with the first report; the others have left when theirs comes."""
    output = Output(generation, 0, 7, clock)
    output.enter(Mock())
    end(output, how)
    assert generation.on_output_ended.called == (how == "failed")
    assert generation.expire.called == (how == "expired")
    generation.reset_mock()
    end(output, how)
    output.part()
    end(output, how)
    assert not generation.method_calls


def test_an_output_that_parts_leaves_what_develops_it(generation, clock):
    output, execution = Output(generation, 0, 7, clock), Mock()
    output.enter(execution)
    output.part()
    execution.leave.assert_called_once_with(output)
