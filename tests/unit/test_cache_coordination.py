"""Coordination within one process."""

import pytest

from tests.support.coordination import TTL_S, CoordinationRules
from tests.support.local_coordinator import LocalCoordinator


class TestLocal(CoordinationRules):
    @pytest.fixture
    def coordinator(self) -> LocalCoordinator:
        return LocalCoordinator()


async def test_what_is_remembered_is_bounded() -> None:
    coordinator = LocalCoordinator(max_events=3, max_names=4)
    held = await coordinator.acquire("held", "a", TTL_S)
    assert held is not None
    for number in range(10):
        await coordinator.publish(held, bytes([number]))
        await coordinator.append(f"other{number}", b"x")
    await coordinator.commit(held, "pointer", b"bill")
    events = [event.data async for event in coordinator.follow("held")]
    assert events == [bytes([7]), bytes([8]), bytes([9])]
    assert len(coordinator._executions) == 4
