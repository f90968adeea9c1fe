"""Streams per caller: counted while they are open, and no longer."""

from __future__ import annotations

import pytest
from safelight_server.api.quota import StreamQuota
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import QueueFullError

ANN, BOB = Caller("ann", "studio"), Caller("bob", "studio")


def test_each_caller_has_its_own_bound():
    quota = StreamQuota(2)
    with quota.stream(ANN), quota.stream(ANN):
        with pytest.raises(QueueFullError) as caught, quota.stream(ANN):
            pass
        with quota.stream(BOB):
            assert len(quota) == 3
    assert caught.value.reason == "TOO_MANY_STREAMS"
    assert caught.value.metadata["subject"] == "caller studio/ann"
    assert caught.value.retry_after_s


def test_a_stream_that_fails_makes_room_and_callers_without_streams_are_forgotten():
    quota = StreamQuota(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="boom"), quota.stream(ANN):
            raise ValueError("boom")
    with pytest.raises(QueueFullError), quota.stream(ANN), quota.stream(ANN):
        pass
    assert len(quota) == 0
    assert not quota._open
