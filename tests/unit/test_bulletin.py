"""The bulletin: a faulty message does not affect the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest
from safelight_server.cluster.bulletin import KEPT_S, STREAM, Bulletin
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import Entry, Sealer
from structlog.testing import capture_logs

from tests.conftest import eventually
from tests.support.local_coordinator import LocalCoordinator


class Desk:
    """Two replicas' bulletins, and the messages that the second one has received."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.coordinator = LocalCoordinator()
        self.sealer = Sealer(Keyring.random(), lambda: self.now)
        self.here, self.there = (Bulletin(self.coordinator, self.sealer) for _ in range(2))
        self.heard: list[tuple[str, Mapping[str, str]]] = []
        self.there.subscribe("want", lambda about, facts: self.heard.append((about, facts)))

    async def post(self, data: bytes, kept_s: float = KEPT_S) -> None:
        await self.coordinator.append(STREAM, self.sealer.seal(STREAM, Entry(data), self.now + kept_s))


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    await desk.post(b'{"kind": "want", "about": "said before anyone listened"}')
    works = [asyncio.create_task(work) for work in (desk.there.listen(), desk.here.talk())]
    await asyncio.sleep(0.01)
    yield desk
    for work in works:
        work.cancel()


async def test_a_message_reaches_its_subscribers(desk: Desk) -> None:
    desk.here.publish("want", "generations/1", by="me")
    desk.here.publish("other", "generations/2")
    desk.here.publish("want", "generations/3")
    await eventually(lambda: len(desk.heard) == 2)
    assert desk.heard == [("generations/1", {"by": "me"}), ("generations/3", {})]


async def test_an_old_message_is_passed_over(desk: Desk) -> None:
    await desk.post(b'{"kind": "want", "about": "late"}', kept_s=-1.0)
    desk.here.publish("want", "new")
    await eventually(lambda: len(desk.heard) == 1)
    assert desk.heard[0][0] == "new"


async def test_what_cannot_be_read_or_done_stops_no_other(desk: Desk) -> None:
    def odd(about: str, facts: Mapping[str, str]) -> None:
        raise KeyError("by")

    desk.there.subscribe("odd", odd)
    with capture_logs() as logs:
        await desk.coordinator.append(STREAM, b"no message")
        for data in (b"\xff", b"[]", b"{}", b'{"kind": "want"}'):
            await desk.post(data)
        desk.here.publish("odd", "generations/1")
        desk.here.publish("want", "generations/2")
        await eventually(lambda: len(desk.heard) == 1)
    assert [entry["event"] for entry in logs] == ["news that cannot be read", *["bug"] * 5]
