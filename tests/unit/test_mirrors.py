"""Mirrors: generations of other replicas."""

from __future__ import annotations

import time
from unittest.mock import AsyncMock, Mock

import pytest
from safelight_server.cluster.records import EventRecord, dump
from safelight_server.coordination.base import StreamEvent
from safelight_server.domain.events import GenerationState
from safelight_server.generations.ownership import WANT
from safelight_server.generations.ownership.mirrors import Mirror, Mirrors

from tests.unit.test_generation import mirror
from tests.unit.test_owners import TTL_S, Pair, pair

__all__ = ["pair"]


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("state", [GenerationState.SUSPENDED, GenerationState.RUNNING])
async def test_an_owner_that_waits_for_a_stream_is_told_again_of_the_one_here(
    pair: Pair, state: GenerationState, *, watched: bool
) -> None:
    """A new owner may have missed the first notification."""
    replica = pair.one
    mirrors = Mirrors(replica.context, Mock(), Mock(), replica.owners, "me")
    generation = mirror(1)
    generation.log.watchers = {Mock()} if watched else set()
    shown = Mirror("name", generation, Mock(), "0-0")
    entry = dump(replica.sealer, "name", EventRecord("state", b"", state=state))
    await mirrors._apply(shown, StreamEvent("1-0", entry))
    assert generation.state is state and shown.place == "1-0"
    told = replica.context.bulletin.publish.call_args_list
    wanted = watched and state is GenerationState.SUSPENDED
    assert [call.args for call in told] == ([(WANT, "x")] if wanted else [])


async def test_a_bug_ends_the_streams_and_not_only_the_task(pair: Pair) -> None:
    host = Mock()
    mirrors = Mirrors(pair.one.context, host, Mock(), pair.one.owners, "me")
    mirrors._follow = AsyncMock(side_effect=ValueError("something that nobody has thought of"))  # type: ignore[method-assign]
    shown = Mirror("name", mirror(1), Mock(identifier="x"), "0-0")
    mirrors._mirrors["x"] = shown
    await mirrors._tend(shown)
    host.moved.assert_called_once_with(shown.generation)
    assert len(mirrors) == 0


@pytest.mark.parametrize("gone", ["before", "meanwhile"])
async def test_what_its_owner_has_forgotten_is_not_adopted(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Its request was refused after its record had been written."""
    host, planner = Mock(), Mock()
    planner.digest.return_value = ""
    mirrors = Mirrors(pair.other.context, host, planner, pair.other.owners, "me")
    shown = Mirror("name", mirror(1), Mock(identifier="x", pipeline=""), "9-0")
    read = AsyncMock(side_effect=[[], []] if gone == "before" else [[StreamEvent("1-0", b"")], [], []])
    monkeypatch.setattr(pair.coordinator, "read", read)
    acquire = AsyncMock(side_effect=pair.coordinator.acquire)
    monkeypatch.setattr(pair.coordinator, "acquire", acquire)
    assert not await mirrors._adopt(shown), "its owner may write it again"
    assert acquire.await_count == (gone == "meanwhile")
    assert await pair.coordinator.holder("name") is None and not host.moved.called
    shown.gone_since = time.monotonic() - TTL_S
    assert await mirrors._adopt(shown)
    host.moved.assert_called_once_with(shown.generation)
    assert not pair.other.owners.owns(shown.generation)
