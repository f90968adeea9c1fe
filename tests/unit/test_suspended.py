"""Suspended generations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import SafelightError
from safelight_server.domain.events import GenerationState
from safelight_server.domain.request import DisconnectPolicy
from safelight_server.generations.suspended import SuspendedGenerations

from tests.conftest import eventually


@dataclass(frozen=True)
class Asked:
    """A fake request: how long it may be resumed."""

    disconnect: DisconnectPolicy


@dataclass(eq=False)
class Generation:
    """A fake generation that records what happens to it."""

    identifier: str
    grace_s: float = 60.0
    tenant: str = "lab"
    ends_by_itself: bool = False
    state: GenerationState = GenerationState.RUNNING
    ended: bool = False
    may_decide: bool = True
    stopped: list[SafelightError] = field(default_factory=list)
    on_stop: Callable[[Generation], None] = lambda _: None

    @property
    def caller(self) -> Caller:
        return Caller("me", self.tenant)

    @property
    def request(self) -> Asked:
        return Asked(DisconnectPolicy(detach=False, resume_grace_s=self.grace_s))

    def suspend(self) -> None:
        self.state = GenerationState.SUSPENDED
        if self.ends_by_itself:
            self.state, self.ended = GenerationState.FAILED, True

    def stop(self, error: SafelightError) -> None:
        self.stopped.append(error)
        self.on_stop(self)


@pytest.fixture
async def lost():
    return SuspendedGenerations(max_entries=2)


async def test_one_is_cancelled_after_its_grace(lost):
    generation = Generation("a", grace_s=0.01)
    lost.suspend(generation)
    await eventually(lambda: bool(generation.stopped))
    assert generation.stopped[0].reason == "GENERATION_CANCELLED"


async def test_one_more_than_there_is_room_for_cancels_the_oldest(lost):
    generations = [Generation(name) for name in "abc"]
    for generation in generations:
        lost.suspend(generation)
    assert [bool(generation.stopped) for generation in generations] == [True, False, False]


async def test_one_tenants_lost_generations_never_cancel_those_of_another(lost):
    mine, theirs = Generation("mine", tenant="studio"), [Generation(name) for name in "abcdef"]
    lost.suspend(mine)
    for generation in theirs:
        generation.on_stop = lost.forget
        lost.suspend(generation)
    assert not mine.stopped
    assert [bool(generation.stopped) for generation in theirs] == [True] * 5 + [False]


async def test_one_that_ends_while_it_is_suspended_takes_no_place(lost):
    """The latest change is reported first, and that may be a failure."""
    lost.suspend(Generation("failed", ends_by_itself=True))
    assert len(lost) == 0


async def test_nothing_is_decided_while_the_lease_is_in_doubt(lost: SuspendedGenerations) -> None:
    one = Generation("a", grace_s=0.0, may_decide=False)
    lost.suspend(one)
    await asyncio.sleep(0.05)
    assert not one.stopped
    one.may_decide = True
    await eventually(lambda: len(one.stopped) == 1)


async def test_only_the_very_generation_is_forgotten(lost):
    one, other = Generation("a"), Generation("a")
    lost.suspend(one)
    lost.forget(other)
    assert list(lost) == ["a"]
    lost.forget(one)
    assert not list(lost)
