"""Common gRPC tools work with a server as people call them: by reflection, with only a prompt."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.conftest import Start, eventually
from tests.support.jaeger import jaeger
from tests.triton.support import ROOT

TOOLS = ROOT / ".tools"
PROMPT = "a red potion on a dark background"
CALL = "safelight.v1.GenerationService/Generate"


async def output(tool: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        TOOLS / tool, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


def messages(text: str) -> list[Any]:
    """The JSON values of `text`, one after another."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


async def test_grpcurl_lists_the_services(start: Start) -> None:
    async with start() as running:
        listed = (await output("grpcurl", "-plaintext", running.address, "list")).split()
    assert {"safelight.v1.GenerationService", "safelight.v1.ModelService", "grpc.health.v1.Health"} <= set(listed)


async def test_grpcurl_gets_a_picture_for_a_prompt(start: Start) -> None:
    async with start() as running:
        body = json.dumps({"spec": {"prompt": PROMPT}})
        text = await output("grpcurl", "-plaintext", "-max-msg-sz", "8388608", "-d", body, running.address, CALL)
    events = [message["event"] for message in messages(text)]
    assert "accepted" in events[0]
    assert any("preview" in event for event in events)
    assert any("artifactChunk" in event for event in events)
    assert "finished" in events[-1]
    assert events[-1]["finished"]["status"].get("code", 0) == 0


async def test_ghz_needs_no_special_fields(start: Start) -> None:
    async with start() as running:
        arguments = [
            "--insecure",
            "--call",
            CALL,
            "-d",
            json.dumps({"spec": {"prompt": PROMPT, "num_inference_steps": 4}}),
        ]
        report = json.loads(await output("ghz", *arguments, "-n", "6", "-c", "2", "-O", "json", running.address))
    assert report["statusCodeDistribution"] == {"OK": 6}
    assert not report.get("errorDistribution")


async def test_jaeger_has_the_servers_spans(start: Start) -> None:
    with jaeger() as traces:
        async with start(otlp_endpoint=f"http://{traces.otlp_grpc}") as running:
            body = json.dumps({"spec": {"prompt": PROMPT, "num_inference_steps": 4}})
            text = await output("grpcurl", "-plaintext", "-d", body, running.address, CALL)
            trace_id = messages(text)[0]["event"]["accepted"]["traceId"]
        await eventually(lambda: len(traces.spans(trace_id)) > 1)
        assert "safelight" in " ".join(traces.services())
