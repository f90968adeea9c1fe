"""Ended generations that are kept for a while: bounded, and forgotten where another replica knows better."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from safelight_server.generations.finished import FinishedGenerations

from tests.unit.test_idempotency import Clock

TTL_S, MAX, MAX_BYTES = 10.0, 3, 100


@dataclass(eq=False)
class Ended:
    """As much of a generation as is looked at."""

    identifier: str
    size: int = 10
    ended_at: float = 0.0
    watchers: set[str] = field(default_factory=set)

    @property
    def log(self) -> SimpleNamespace:
        return SimpleNamespace(artifact_bytes=self.size, watchers=self.watchers)

    @property
    def times(self) -> SimpleNamespace:
        return SimpleNamespace(ended=self.ended_at)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def finished(clock: Clock) -> FinishedGenerations:
    return FinishedGenerations(TTL_S, MAX, MAX_BYTES, clock)


def names(finished: FinishedGenerations) -> str:
    return "".join(generation.identifier for generation in finished.values())


def test_the_one_that_ended_first_makes_room(finished: FinishedGenerations) -> None:
    for name in "abcd":
        finished.add(Ended(name))  # type: ignore[arg-type]
    assert names(finished) == "bcd"


def test_one_that_is_watched_is_not_dropped_before_its_time(finished: FinishedGenerations, clock: Clock) -> None:
    finished.add(Ended("a", watchers={"someone"}))  # type: ignore[arg-type]
    for name in "bcde":
        finished.add(Ended(name))  # type: ignore[arg-type]
    assert "a" in finished
    clock.now = TTL_S + 1.0
    finished.trim()
    assert len(finished) == 0


def test_bytes_are_bounded(finished: FinishedGenerations) -> None:
    finished.add(Ended("a", 60))  # type: ignore[arg-type]
    finished.add(Ended("b", 60))  # type: ignore[arg-type]
    assert names(finished) == "b"


def test_what_another_replica_knows_better_is_forgotten_with_its_bytes(finished: FinishedGenerations) -> None:
    one, other = Ended("a", 60), Ended("b", 30)
    finished.add(one)  # type: ignore[arg-type]
    finished.add(other)  # type: ignore[arg-type]
    finished.remove(Ended("a"))  # type: ignore[arg-type]  # of that name, and not the one that is kept
    assert finished.get("a") is one
    finished.remove(one)  # type: ignore[arg-type]
    finished.remove(one)  # type: ignore[arg-type]
    assert finished.get("a") is None
    finished.add(Ended("c", 70))  # type: ignore[arg-type]
    assert names(finished) == "bc", "the bytes of what was forgotten are free"
