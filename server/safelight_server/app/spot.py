"""Waits for the notice that this machine, a spot instance, will be interrupted.

AWS gives it two minutes before, through a metadata service that only the instance reaches
(IMDSv2: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html).
If the service does not answer, it is polled again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus

import httpx2
import structlog

log = structlog.get_logger(__name__)

PERIOD_S = 5.0
"""How often the service is polled; AWS recommends this."""
TIMEOUT_S = 2.0
TOKEN_TTL_S = 21_600
"""Life of a token, the longest that is allowed; a token that the service rejects is replaced."""
NOTICE_S = 120.0
"""Time that is assumed to be left if the notice has no time."""
RESERVE_S = 20.0
"""Time kept after the drain, for the last messages and the end of this and other processes."""


@dataclass(frozen=True, slots=True)
class SpotNotice:
    """The notice of an interruption.

    Attributes:
        action: "terminate", "stop" or "hibernate".
        left_s: seconds until then.
    """

    action: str
    left_s: float

    def grace_s(self, wanted_s: float) -> float:
        """How long a drain may take: `wanted_s`, or less if the instance ends before."""
        return max(0.0, min(wanted_s, self.left_s - RESERVE_S))


async def spot_notice(url: str, now: Callable[[], float], period_s: float = PERIOD_S) -> SpotNotice:
    """Polls the metadata service, and returns once there is a notice.

    Args:
        url: URL of the metadata service, without a path.
        now: Unix seconds.
    """
    failure_logged, token = False, ""
    # no proxy: it would return the notice of the instance that the proxy runs on
    async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http:
        while True:
            try:
                token = token or await _token(http)
                answer = await http.get(
                    "/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
                )
                if answer.status_code == HTTPStatus.OK:
                    return _notice(answer.text, now())
                if answer.status_code == HTTPStatus.UNAUTHORIZED:
                    token = ""
                elif answer.status_code != HTTPStatus.NOT_FOUND:  # 404 means that there is no notice
                    answer.raise_for_status()
                if failure_logged:
                    log.info("spot_notice_asked_again", url=url)
                failure_logged = False
            except httpx2.HTTPError as error:
                token = ""
                if not failure_logged:
                    log.warning("spot_notice_cannot_be_asked", url=url, error=str(error) or type(error).__name__)
                failure_logged = True
            await asyncio.sleep(period_s)


async def _token(http: httpx2.AsyncClient) -> str:
    """A session token of IMDSv2, which every request needs."""
    answer = await http.put("/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)})
    answer.raise_for_status()
    return answer.text


def _notice(text: str, now: float) -> SpotNotice:
    """The notice of a response. One that cannot be read still counts as a notice."""
    action, left_s = "", NOTICE_S
    try:
        content = json.loads(text)
        action = str(content["action"])
        left_s = datetime.fromisoformat(content["time"]).timestamp() - now
    except (KeyError, TypeError, ValueError) as error:
        log.warning("spot_notice_unreadable", text=text[:200], error=str(error))
    return SpotNotice(action or "terminate", left_s)
