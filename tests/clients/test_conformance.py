"""Runs every case of clients/conformance/cases.json with the runner of every language, against a real server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safelight
from google.protobuf import json_format
from safelight.v1 import generation_pb2 as pb
from safelight_server.app.server import Running

from tests.clients.case import CASES, SIMULATED, Setting, is_of_http, requests, run, shared_server
from tests.clients.runner import Runner
from tests.conftest import serving_here
from tests.integration.test_images import MASK, PHOTO
from tools.clients.runners import LANGUAGES, WEB, is_here

RAW = "application/x-raw-rgba8"
MANY_COPIES, FEW_AT_ONCE = 8, 3
"""A case with more generations keeps the machine busy, so only this many languages run it at once."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("language", LANGUAGES)
def test_its_runner_is_built(language: str, runners) -> None:
    runners(language)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
async def test_case(case: dict[str, Any], runners, tmp_path: Path) -> None:
    """Runs all languages at once, most with servers of their own, since long cases mostly wait."""
    languages = [language for language in LANGUAGES if is_here(language) and (language != WEB or is_of_http(case))]
    for language in languages:
        (tmp_path / language).mkdir()
    turns = asyncio.Semaphore(FEW_AT_ONCE if case.get("copies", 1) > MANY_COPIES else len(languages))
    async with shared_server(case) as shared:

        async def run_one(language: str) -> None:
            async with turns:
                await run_and_check(case, language, runners(language), tmp_path / language, shared)

        done = await asyncio.gather(*map(run_one, languages), return_exceptions=True)
    failures = {language: error for language, error in zip(languages, done, strict=True) if error is not None}
    if failures:
        raise ExceptionGroup(f"{case['name']}: {', '.join(failures)}", list(failures.values()))


async def run_and_check(
    case: dict[str, Any], language: str, runner: Runner, folder: Path, shared: Running | None
) -> None:
    report, setting = await run(case, runner, folder, http=language == WEB, shared=shared)
    assert report["case"] == case["name"]
    assert len(report["generations"]) == case.get("copies", 1)
    unseen = list(case["expect"])
    for seen, request in zip(report["generations"], requests(case), strict=True):
        outcome = next((one for one in case["expect"] if one["code"] == seen["code"]), None)
        assert outcome is not None, seen
        await check(outcome, seen, request, case, setting)
        unseen = [one for one in unseen if one is not outcome]
    assert not unseen, "each outcome came at least once"
    if any(outcome.get("same_generation") for outcome in case["expect"]):
        assert len({seen["generation"] for seen in report["generations"]}) == 1


async def check(
    outcome: dict[str, Any], seen: dict[str, Any], request: dict[str, Any], case: dict[str, Any], setting: Setting
) -> None:
    """Compares the outcome of one generation with the expected outcome."""
    assert seen["reason"] == outcome.get("reason", ""), seen
    assert sorted(seen["violations"]) == outcome.get("violations", [])
    assert all(seen["violations"].values()), "each says what to change"
    assert (seen["retry_after_s"] is not None) == outcome.get("retry_after", False)
    assert seen["reliable"] == outcome["reliable"]
    if case.get("servers", 1) == 1:
        assert_in_order(seen["steps"])
        assert_in_order([(preview["output_index"], preview["step"]) for preview in seen["previews"]])
    if "num_steps" in outcome:
        assert seen["num_steps"] == outcome["num_steps"]
    if "connections" in outcome:
        assert setting.relay is not None and setting.relay.num_connections == outcome["connections"]
    if (cancelled := outcome.get("cancelled")) is not None:
        assert seen["cancelled"]["state"] == cancelled["state"]
        assert all(cancelled["min_step"] <= step <= cancelled["max_step"] for step in seen["cancelled"]["steps"])
    if "refused" in outcome:
        assert outcome["refused"] in setting.refused, "it was refused before"
    check_previews(outcome.get("previews", {}), seen["previews"])
    if seen["pictures"]:
        digests = [picture["sha256"] for picture in sorted(seen["pictures"], key=lambda one: one["output_index"])]
        assert digests == await reference(case, request)
        if (watched := outcome.get("watched")) is not None:
            assert seen["watched"] == watched | {"sha256": digests}
    for name, value in outcome.get("picture", {}).items():
        assert [picture[name] for picture in seen["pictures"]] == [value] * len(seen["pictures"])


def assert_in_order(steps: list[tuple[int, int]]) -> None:
    """Steps of an output never decrease; they may repeat, since a resumed stream begins with the newest step."""
    for index in {output for output, _ in steps}:
        of_output = [step for output, step in steps if output == index]
        assert of_output == sorted(of_output)


def check_previews(expected: dict[str, Any], previews: list[dict[str, Any]]) -> None:
    """Compares the previews' number, encoding and first step."""
    assert expected.get("min", 0) <= len(previews) <= expected.get("max", len(previews))
    if "first_step_at_most" in expected:
        assert previews[0]["step"] <= expected["first_step_at_most"]
    for name in ("media_type", "stride_bytes", "num_bytes"):
        if name in expected:
            assert {preview[name] for preview in previews} == {expected[name]}
    if expected.get("dropped"):
        assert sum(preview["num_dropped"] for preview in previews) > 0


async def reference(case: dict[str, Any], request: dict[str, Any]) -> list[str]:
    """SHA-256 of the bytes that a request's pictures must have; raw rows are made from the PNG's pixels."""
    message = json_format.ParseDict(request, pb.GenerateRequest())
    runtime = case.get("settings", {}).get("runtime", "simulated")
    client = case.get("client", {})
    if "guidance_interval" in client:
        message.spec.guidance_interval.start, message.spec.guidance_interval.end = client["guidance_interval"]
        message.spec.guidance_rescale = client["guidance_rescale"]
    pictures = [safelight.ImageFile(data) for data in (PHOTO, MASK)] if case.get("init_image") else []
    if pictures:
        message.spec.init_image, message.spec.mask = (picture.name for picture in pictures)
    files = await pngs(runtime, message.spec.SerializeToString(deterministic=True), pictures)
    encoding = message.encoding
    if encoding.media_type != RAW:
        return [hashlib.sha256(file.data).hexdigest() for file in files]
    digests = []
    for file in files:
        pixels = file.array()
        row_bytes = 4 * file.width_px
        stride = -row_bytes % max(4, encoding.row_alignment_bytes) + row_bytes
        rows = np.zeros((file.height_px, stride), np.uint8)
        rows[:, :row_bytes] = pixels.reshape(file.height_px, row_bytes)
        flipped = encoding.row_order == pb.PixelEncoding.ROW_ORDER_BOTTOM_UP
        digests.append(hashlib.sha256((rows[::-1] if flipped else rows).tobytes()).hexdigest())
    return digests


KNOWN: dict[tuple[str, bytes], list[safelight.Picture]] = {}


async def pngs(runtime: str, spec: bytes, pictures: Sequence[safelight.ImageFile] = ()) -> list[safelight.Picture]:
    """The pictures of a spec, computed by a server that no case uses."""
    if (runtime, spec) not in KNOWN:
        settings = SIMULATED | {"simulated_base_ms": 0} if runtime == "simulated" else {"runtime": runtime}
        request = pb.GenerateRequest(spec=pb.GenerationSpec.FromString(spec), encoding={"media_type": "image/png"})
        async with serving_here(**settings) as running, safelight.Client(running.address) as client:
            named = {picture.name: picture for picture in pictures}
            KNOWN[runtime, spec] = await safelight.GenerationStream(client.develop(request, images=named)).pictures()
    return KNOWN[runtime, spec]
