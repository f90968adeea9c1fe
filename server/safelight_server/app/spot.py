"""Hears in advance that this machine, a spot instance, will be taken away.

AWS says so two minutes before, at an address that only the instance reaches
(IMDSv2: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html).
A service that does not answer is no notice: it is asked again.
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
"""How often it is asked; AWS recommends this."""
TIMEOUT_S = 2.0
TOKEN_TTL_S = 21_600
"""As long as a token may be valid; a token that the service no longer takes is replaced."""
NOTICE_S = 120.0
"""What is left where the notice does not say."""
RESERVE_S = 20.0
"""Left after the drain: for the last messages, the end of the process and of what runs beside it."""


@dataclass(frozen=True, slots=True)
class SpotNotice:
    """What will happen to this instance.

    Attributes:
        action: "terminate", "stop" or "hibernate".
        left_s: seconds until then.
    """

    action: str
    left_s: float

    def grace_s(self, wanted_s: float) -> float:
        """How long a drain may take that would be given `wanted_s`."""
        return max(0.0, min(wanted_s, self.left_s - RESERVE_S))


async def spot_notice(url: str, now: Callable[[], float], period_s: float = PERIOD_S) -> SpotNotice:
    """Returns once there is a notice.

    Args:
        url: where the metadata service is, without a path.
        now: Unix seconds.
    """
    is_told, token = False, ""
    # A proxy would answer for the instance that it runs on itself.
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
                elif answer.status_code != HTTPStatus.NOT_FOUND:  # which is: no notice
                    answer.raise_for_status()
                if is_told:
                    log.info("spot_notice_asked_again", url=url)
                is_told = False
            except httpx2.HTTPError as error:
                token = ""
                if not is_told:
                    log.warning("spot_notice_cannot_be_asked", url=url, error=str(error) or type(error).__name__)
                is_told = True
            await asyncio.sleep(period_s)


async def _token(http: httpx2.AsyncClient) -> str:
    """A session token of IMDSv2, without which nothing is answered."""
    answer = await http.put("/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)})
    answer.raise_for_status()
    return answer.text


def _notice(text: str, now: float) -> SpotNotice:
    """The notice in an answer; one that cannot be read is a notice all the same."""
    action, left_s = "", NOTICE_S
    try:
        content = json.loads(text)
        action = str(content["action"])
        left_s = datetime.fromisoformat(content["time"]).timestamp() - now
    except (KeyError, TypeError, ValueError) as error:
        log.warning("spot_notice_unreadable", text=text[:200], error=str(error))
    return SpotNotice(action or "terminate", left_s)
