"""Tests that every runner prints when its caller got each preview, which the clients' benchmark needs."""

from __future__ import annotations

import asyncio
import time

from google.protobuf import json_format
from safelight.v1 import generation_pb2 as pb

from load_tests.ports import free_port
from tests.clients.case import SIMULATED
from tools.clients.runners import LANGUAGES, SYNC, WEB, is_here, told

TOLERANCE_US = 1_000_000


async def test_every_runner_says_when_its_caller_had_each_preview(start, runners) -> None:
    spec = pb.GenerationSpec(prompt="a red potion", num_inference_steps=40)
    request = json_format.MessageToDict(pb.GenerateRequest(spec=spec))
    languages = [language for language in (*LANGUAGES, SYNC) if is_here(language)]
    async with start(**SIMULATED, http_port=free_port()) as server:
        addresses = [server.http_address if language == WEB else server.address for language in languages]
        began_us = time.time_ns() // 1000
        reports = await asyncio.gather(
            *(
                runners(language).run(told("measure", [address], [request], measure=True))
                for language, address in zip(languages, addresses, strict=True)
            )
        )
        ended_us = time.time_ns() // 1000
    for language, report in zip(languages, reports, strict=True):
        [seen] = report["generations"]
        times_us = seen["received_us"]
        assert seen["code"] == "OK", (language, seen)
        assert 1 <= len(times_us) <= 39, (language, "the picture follows the last step")
        assert times_us == sorted(times_us), language
        # Node's clock is the time of its start plus a monotonic clock, and the system's clock is adjusted meanwhile.
        assert began_us - TOLERANCE_US <= times_us[0] and times_us[-1] <= ended_us + TOLERANCE_US, language
        assert not seen.get("previews"), (language, "they would cost more than what is measured")
