"""Health: each watcher gets each change, even if others leave meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from grpc_health.v1 import health_pb2
from safelight_server.api.health import HEALTH_SERVICE, Health
from safelight_server.app.listening import follow_health
from safelight_server.domain.errors import NotFoundError, UnavailableError

SERVING, NOT_SERVING, UNKNOWN = (
    getattr(health_pb2.HealthCheckResponse, name) for name in ("SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
)


def ask(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def status_of(watch) -> int:
    return (await anext(watch)).status


async def test_each_watcher_hears_a_change_when_another_has_left():
    health = Health()
    health.set(("", "a"), SERVING)
    leaving, staying = health.watch(ask("a"), None), health.watch(ask("a"), None)
    assert [await status_of(leaving), await status_of(staying)] == [SERVING, SERVING]
    await leaving.aclose()
    health.set(("a",), NOT_SERVING)
    assert await status_of(staying) == NOT_SERVING


async def test_a_service_that_is_not_there_may_come():
    health = Health()
    watch = health.watch(ask("a"), None)
    assert await status_of(watch) == UNKNOWN
    with pytest.raises(NotFoundError):
        await health.check(ask("a"), None)
    health.set(("a",), SERVING)
    assert await status_of(watch) == SERVING
    assert (await health.check(ask("a"), None)).status == SERVING


async def test_a_drain_is_told_and_is_final():
    health = Health()
    health.set(("", "a"), SERVING)
    watch = health.watch(ask(), None)
    assert await status_of(watch) == SERVING
    health.drain()
    health.set(("",), SERVING)
    assert await status_of(watch) == NOT_SERVING
    assert (await health.check(ask("a"), None)).status == NOT_SERVING
    health.end_watches()
    for each in (watch, health.watch(ask(), None)):
        with pytest.raises(UnavailableError):
            await anext(each)


async def test_the_process_is_said_to_live_while_its_runtime_is_away():
    health, names = Health(), ("", HEALTH_SERVICE)
    health.set(names, SERVING)
    engine = SimpleNamespace(outage=SimpleNamespace(beyond_grace=True))
    following = asyncio.create_task(follow_health(health, names, engine))
    watch = health.watch(ask(), None)
    while await status_of(watch) != NOT_SERVING:
        pass
    assert (await health.check(ask(HEALTH_SERVICE), None)).status == SERVING
    following.cancel()
