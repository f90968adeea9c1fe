"""Generations that another replica owns (mirrors)."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.cluster.records import EventRecord
from safelight_server.domain.errors import DeadlineExceededError
from safelight_server.domain.events import FinishReason, GenerationState
from safelight_server.domain.request import DisconnectPolicy, Request
from safelight_server.generations import generation as generations
from safelight_server.generations.generation import Generation
from safelight_server.scheduler import Priority
from safelight_server.stream import EventLog
from safelight_server.telemetry.tracing import UNTRACED

from tests.conftest import eventually
from tests.support.streams import NONE, PICTURE, RAW, SPEC, Clock


def mirror(num_outputs: int) -> Generation:
    """A generation that another replica owns."""
    request = SimpleNamespace(
        spec=replace(SPEC, seeds=tuple(range(num_outputs))), priority=Priority.STANDARD, held_bytes=0
    )
    events = EventLog("generations/x", Clock(), chunk_bytes=1000, max_watchers=1)
    made = Generation("x", Mock(), request, events, Clock(), UNTRACED, deadline=None, late=Mock(), on_end=Mock())
    made.owned = False
    return made


@given(texts=st.lists(st.text(max_size=300), max_size=16, unique=True), prompt=st.text(max_size=2000))
def test_what_it_holds_is_counted_with_what_the_client_wrote(texts: list[str], prompt: str) -> None:
    """At least the size that CPython reports, also after protobuf has cached the strings' UTF-8."""
    labels = {text: text[::-1] for text in texts}
    request = Request(
        replace(SPEC, prompt=prompt), NONE, RAW, Priority.STANDARD, DisconnectPolicy(False, 0), labels=labels
    )
    strings = [prompt, *labels, *labels.values()]
    assert request.held_bytes >= sum(
        sys.getsizeof(text) + len(text.encode()) * (not text.isascii()) for text in strings
    )
    generation = mirror(1)
    before = generation.held_bytes
    generation.hear(EventRecord("output", b"x" * 100, 1, 0, FinishReason.COMPLETED, 50), PICTURE)
    assert generation.held_bytes >= before + len(PICTURE.data) + 100
    events = EventLog("generations/x", Clock(), chunk_bytes=1000, max_watchers=1)
    made = Generation("x", Mock(), request, events, Clock(), UNTRACED, deadline=None, late=Mock(), on_end=Mock())
    assert made.held_bytes >= request.held_bytes


def test_the_pictures_that_it_starts_from_count_until_it_has_ended() -> None:
    generation = mirror(1)
    without = generation.held_bytes
    generation.picture_bytes = 5000
    assert generation.held_bytes == without + 5000
    generation.finish_time = datetime.now(UTC)
    assert generation.held_bytes == without


def test_what_its_outputs_came_to_here_goes_when_their_owner_has_decided() -> None:
    generation = mirror(2)
    for output in generation.outputs:
        output.developed(Mock())
    first, second = generation.outputs
    generation.hear(EventRecord("output", b"", 1, 0, FinishReason.COMPLETED, 50), PICTURE)
    assert first.held is None
    assert second.held is not None
    generation.hear(EventRecord("finished", b"", 2, state=GenerationState.CANCELLED), None)
    assert second.held is None


async def test_a_deadline_decides_nothing_while_the_lease_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may have been frozen while another replica took over."""
    monkeypatch.setattr(generations, "DECIDE_RETRY_S", 0.001)
    generation = mirror(1)
    generation.owned, generation._late = True, lambda: DeadlineExceededError("late")
    generation.journal = generation.log.journal = journal = Mock(held=False)
    generation.expire()
    await asyncio.sleep(0.01)
    assert not generation.ended and not journal.event.called
    journal.held = True
    await eventually(lambda: generation.ended)
    assert generation.state is GenerationState.FAILED
    assert generation.outputs[0].reason is FinishReason.DEADLINE_EXCEEDED


async def test_the_deadline_of_what_another_replica_owns_is_that_ones() -> None:
    generation = mirror(1)
    generation.expire()
    assert not generation.ended and generation._expiry is None
