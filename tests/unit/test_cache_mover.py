"""Writes off the request path."""

import asyncio

from safelight_server.storage.mover import Mover
from structlog.testing import capture_logs


class Target:
    def __init__(self, max_bytes: int = 100) -> None:
        self.written: list[tuple[str, bytes]] = []
        self.gate = asyncio.Event()
        self.mover = Mover(self.write, max_bytes)

    async def write(self, key: str, value: bytes) -> None:
        await self.gate.wait()
        self.written.append((key, value))


async def test_in_order_the_newest_value_of_a_key_once() -> None:
    target = Target()
    for key, value in (("a", b"1"), ("b", b"2"), ("a", b"3")):
        assert target.mover.offer(key, value)
    assert target.mover.get("a") == b"3"
    target.gate.set()
    await target.mover.flush()
    assert target.written == [("a", b"3"), ("b", b"2")]
    assert target.mover.get("a") is None
    await target.mover.close()


async def test_what_waits_is_bounded_by_bytes() -> None:
    target = Target(max_bytes=10)
    assert target.mover.offer("a", bytes(6))
    assert not target.mover.offer("b", bytes(5))
    assert target.mover.offer("a", bytes(10)), "a newer value takes the place of the older one"
    assert not target.mover.offer("a", bytes(11))
    assert target.mover.get("a") is None, "the older value is not written for the newer one"
    assert target.mover.offer("b", bytes(10))
    target.gate.set()
    await target.mover.flush()
    assert target.written == [("b", bytes(10))]
    await target.mover.close()


async def test_settling_waits_for_the_write_under_way() -> None:
    target = Target()
    target.mover.offer("a", b"1")
    await asyncio.sleep(0)
    assert list(target.mover.items()) == [("a", b"1")]
    settling = asyncio.create_task(target.mover.settle("a"))
    await target.mover.settle("b")
    await asyncio.sleep(0)
    assert not settling.done()
    target.gate.set()
    await settling
    assert target.written == [("a", b"1")]
    await target.mover.close()


async def test_closing_gives_up_what_waits() -> None:
    target = Target()
    target.mover.offer("a", b"1")
    await asyncio.sleep(0)
    await target.mover.close()
    await target.mover.close()
    assert target.written == []


async def test_what_is_closed_takes_nothing_more() -> None:
    target = Target()
    target.gate.set()
    await target.mover.close()
    assert not target.mover.offer("late", b"1")
    await asyncio.sleep(0)
    assert not target.written and target.mover.get("late") is None


async def test_a_value_that_cannot_be_written_stops_no_other() -> None:
    target = Target()

    async def write(key: str, value: bytes) -> None:
        if key == "odd":
            raise ValueError(key)
        await target.write(key, value)

    target.mover = Mover(write, 100)
    target.gate.set()
    with capture_logs() as logs:
        for key in ("odd", "b"):
            target.mover.offer(key, b"1")
        await target.mover.flush()
    assert target.written == [("b", b"1")]
    assert [(entry["event"], entry["key"]) for entry in logs] == [("bug", "odd")]
    await target.mover.close()
