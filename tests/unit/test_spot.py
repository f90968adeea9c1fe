"""The notice of a spot instance's end is noticed, whatever faults the metadata service had before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from safelight_server.app.spot import NOTICE_S, RESERVE_S, SpotNotice, spot_notice
from structlog.testing import capture_logs

from tests.conftest import eventually
from tests.support.metadata_service import MetadataService, metadata_service

NOW = 1_505_981_502.0  # 2017-09-21T08:11:42Z
NOTICE = '{"action": "stop", "time": "2017-09-21T08:13:42Z"}'


@pytest.fixture
def service() -> Iterator[MetadataService]:
    with metadata_service() as service:
        yield service


def heard(service: MetadataService) -> asyncio.Task[SpotNotice]:
    return asyncio.create_task(spot_notice(service.url, lambda: NOW, period_s=0.01))


async def test_a_notice_is_heard_when_it_comes(service: MetadataService) -> None:
    notice = heard(service)
    await eventually(lambda: service.num_asked(HTTPStatus.NOT_FOUND) >= 2)
    assert service.asked.count(("PUT", HTTPStatus.OK)) == 1, "one token serves"
    assert not notice.done()
    service.notice = NOTICE
    assert await notice == SpotNotice("stop", 120.0)


async def test_a_token_that_has_expired_is_replaced(service: MetadataService) -> None:
    notice = heard(service)
    await eventually(lambda: service.num_asked(HTTPStatus.NOT_FOUND) >= 1)
    service.expire()
    await eventually(lambda: service.num_asked(HTTPStatus.UNAUTHORIZED) >= 1)
    service.notice = NOTICE
    assert (await notice).action == "stop"


async def test_a_service_that_fails_is_no_notice_and_is_told_once(service: MetadataService) -> None:
    service.broken = True
    with capture_logs() as logs:
        notice = heard(service)
        await eventually(lambda: len(service.asked) >= 3)
        service.broken = False
        await eventually(lambda: service.num_asked(HTTPStatus.NOT_FOUND) >= 1)
        service.notice = NOTICE
        await notice
    assert [line["event"] for line in logs] == ["spot_notice_cannot_be_asked", "spot_notice_asked_again"]


async def test_proxies_are_passed_by(service: MetadataService, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    service.notice = NOTICE
    assert (await heard(service)).action == "stop"


@pytest.mark.parametrize("text", ["soon", "[]", '{"action": "stop", "time": "soon"}', '{"time": null}'])
async def test_a_notice_that_cannot_be_read_is_one(service: MetadataService, text: str) -> None:
    service.notice = text
    assert (await heard(service)).left_s == NOTICE_S


def test_a_drain_ends_before_the_instance_does() -> None:
    assert SpotNotice("terminate", 120.0).grace_s(30.0) == 30.0
    assert SpotNotice("terminate", 120.0).grace_s(600.0) == 120.0 - RESERVE_S
    assert SpotNotice("terminate", 10.0).grace_s(600.0) == 0.0
