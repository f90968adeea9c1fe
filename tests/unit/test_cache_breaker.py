"""The circuit breaker of a failing service."""

import asyncio

import pytest
from safelight_server.storage.base import LeftAloneError, StoreFullError, StoreUnavailableError
from safelight_server.storage.breaker import Breaker, BreakerState
from structlog.testing import capture_logs

from tests.conftest import eventually


class Service:
    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0
        self.fault: BaseException | None = StoreUnavailableError("down")
        self.breaker = Breaker("it", timeout_s=0.01, max_failures=3, open_s=2.0, clock=lambda: self.now)

    async def work(self) -> str:
        self.calls += 1
        if self.fault is not None:
            raise self.fault
        return "done"

    async def call(self) -> str:
        try:
            return await self.breaker.call(self.work)
        except LeftAloneError:
            return "left alone"
        except StoreUnavailableError:
            return "failed"


async def test_it_opens_after_failures_in_a_row_and_closes_when_one_call_succeeds() -> None:
    service = Service()
    with capture_logs() as lines:
        assert [await service.call() for _ in range(6)] == ["failed"] * 3 + ["left alone"] * 3
        service.now = 1.9
        assert await service.call() == "left alone"
        service.now = 2.0
        assert await service.call() == "failed", "one tries"
        assert await service.call() == "left alone"
        service.now, service.fault = 4.0, None
        assert [await service.call() for _ in range(3)] == ["done"] * 3
    assert service.calls == 3 + 1 + 3
    assert [line["log_level"] for line in lines] == ["warning", "info"], "once each"


async def test_a_success_between_failures_keeps_it_closed() -> None:
    service = Service()
    for _ in range(5):
        service.fault = StoreUnavailableError("down")
        assert [await service.call() for _ in range(2)] == ["failed"] * 2
        service.fault = None
        assert await service.call() == "done"


async def test_only_one_call_tries_however_many_come() -> None:
    service = Service()
    for _ in range(3):
        await service.call()
    service.now = 3.0
    gate = asyncio.Event()

    async def hangs() -> None:
        service.calls += 1
        await gate.wait()

    service.breaker._timeout_s = 30.0
    trying = asyncio.create_task(service.breaker.call(hangs))
    await eventually(lambda: service.breaker.state is BreakerState.HALF_OPEN)
    assert await asyncio.gather(*(service.call() for _ in range(100))) == ["left alone"] * 100
    gate.set()
    await trying
    assert service.calls == 4
    assert service.breaker.state is BreakerState.CLOSED


async def test_a_call_that_hangs_fails_in_time() -> None:
    service = Service()
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            await service.breaker.call(asyncio.Event().wait)
    assert service.breaker.state is BreakerState.OPEN


async def test_a_full_service_works() -> None:
    service = Service()
    service.fault = StoreFullError("full")
    for _ in range(10):
        with pytest.raises(StoreFullError):
            await service.breaker.call(service.work)
    assert service.breaker.state is BreakerState.CLOSED


async def test_when_the_one_that_tries_goes_away_the_next_one_tries() -> None:
    service = Service()
    for _ in range(3):
        await service.call()
    service.now = 3.0
    service.breaker._timeout_s = 30.0
    trying = asyncio.create_task(service.breaker.call(asyncio.Event().wait))
    await eventually(lambda: service.breaker.state is BreakerState.HALF_OPEN)
    trying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trying
    service.fault = None
    assert await service.call() == "done"


async def test_states_are_told() -> None:
    told: list[BreakerState] = []
    breaker = Breaker("it", 1.0, max_failures=1, open_s=0.0, on_state=told.append)

    async def fails() -> None:
        raise StoreUnavailableError("down")

    with pytest.raises(StoreUnavailableError):
        await breaker.call(fails)
    await breaker.call(lambda: asyncio.sleep(0))
    assert told == [BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN, BreakerState.CLOSED]
