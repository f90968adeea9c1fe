"""The runner of the Python client: reads cases (JSON, a line each), runs them, prints what came (JSON, a line each).

With `--sync` it measures the client for programs without asyncio, and does nothing else. See clients/CONFORMANCE.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import safelight
from google.protobuf import json_format
from safelight.servers import MAX_MESSAGE_BYTES
from safelight.v1 import generation_pb2 as pb


async def run(case: dict[str, Any]) -> dict[str, Any]:
    """Sends all requests of a case at once; what came of each, in their order."""
    client = safelight.Client(
        case["targets"],
        api_key=case["api_key"],
        credentials=credentials(case),
        server_name=case["server_name"],
        patience_s=case["patience_s"],
        retries=case["retries"],
        max_message_bytes=case["max_message_bytes"] or MAX_MESSAGE_BYTES,
    )
    async with client:
        generations = await asyncio.gather(*(generate(client, case, request) for request in case["requests"]))
    return {"case": case["name"], "generations": generations}


def credentials(case: dict[str, Any]) -> grpc.ChannelCredentials | None:
    """Those of TLS, or None for plain text."""
    roots, cert, key = (
        Path(case[name]).read_bytes() if case[name] else None for name in ("ca_file", "cert_file", "key_file")
    )
    return grpc.ssl_channel_credentials(roots, key, cert) if roots else None


async def generate(client: safelight.Client, case: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Sends one request."""
    seen: dict[str, Any] = {"code": "OK", "reason": "", "violations": {}, "retry_after_s": None}
    seen |= {"generation": "", "reliable": [], "steps": [], "previews": [], "pictures": [], "cancelled": None}
    seen |= {"watched": None, "received_us": []}
    message = json_format.ParseDict(request, pb.GenerateRequest())
    if case["init_image_file"]:
        init_image, mask = [await client.upload_image(Path(case[name])) for name in ("init_image_file", "mask_file")]
        message.spec.init_image, message.spec.mask = init_image.name, mask.name
    try:
        async for event in asked(client, case, message):
            await take(client, case, event, seen)
        if case["watch_again"]:
            seen["watched"] = await watch_again(client, seen["generation"])
    except safelight.GenerationError as error:
        seen |= {"code": error.code.name, "reason": error.reason, "violations": error.violations}
        seen |= {"retry_after_s": error.retry_after_s, "message": str(error)}
    return seen


def asked(
    client: safelight.Client, case: dict[str, Any], message: pb.GenerateRequest
) -> AsyncIterator[safelight.Event]:
    """Sends a message as it is; or says it in plain arguments, where the case has some."""
    spec, timeout_s = message.spec, case["timeout_s"] or None
    plain: safelight.GenerateOptions = {}
    if case["guidance_interval"]:
        start, end = case["guidance_interval"]
        plain |= {"guidance_interval": (start, end), "guidance_rescale": case["guidance_rescale"]}
    if case["min_num_steps"]:
        plain |= {"quality_floor": safelight.QualityFloor(min_num_steps=case["min_num_steps"])}
    if not plain:
        return client.develop(message, timeout_s=timeout_s)
    if spec.HasField("guidance_scale"):
        plain |= {"guidance_scale": spec.guidance_scale}
    plain |= {
        "steps": spec.num_inference_steps,
        "seeds": [output.seed for output in spec.outputs],
        "timeout_s": timeout_s,
    }
    return client.generate(spec.prompt, **plain)


async def watch_again(client: safelight.Client, name: str) -> dict[str, Any]:
    """What a second screen sees, and what the server says of the generation and of its models."""
    kinds = {safelight.Accepted: "accepted", safelight.Picture: "picture", safelight.Finished: "finished"}
    events = [event async for event in client.watch(name, previews=False) if type(event) in kinds]
    pictures = [event for event in events if isinstance(event, safelight.Picture)]
    return {
        "reliable": [kinds[type(event)] for event in events],
        "sha256": [hashlib.sha256(picture.data).hexdigest() for picture in sorted(pictures, key=by_output)],
        "state": pb.Generation.State.Name((await client.get(name)).state),
        "models": [model.name for model in await client.models()],
    }


def by_output(picture: safelight.Picture) -> int:
    return picture.output_index


async def take(client: safelight.Client, case: dict[str, Any], event: safelight.Event, seen: dict[str, Any]) -> None:
    """Notes an event."""
    match event:
        case safelight.Accepted():
            seen["generation"] = event.generation
            seen["reliable"].append("accepted")
        case safelight.Progress():
            seen["steps"].append([event.output_index, event.step])
            if case["cancel_at_step"] and event.step >= case["cancel_at_step"] and seen["cancelled"] is None:
                ended = await client.cancel(seen["generation"])
                state = pb.Generation.State.Name(ended.state)
                seen["cancelled"] = {"state": state, "steps": [output.step for output in ended.outputs]}
        case safelight.Preview() if case["measure"]:
            seen["received_us"].append(now_us())
        case safelight.Preview():
            seen["previews"].append(
                image(event) | {"step": event.step, "num_bytes": len(event.data), "num_dropped": event.num_dropped}
            )
            await asyncio.sleep(case["pause_s"])
        case safelight.Picture():
            seen["reliable"].append("picture")
            digest = hashlib.sha256(event.data).hexdigest()
            seen["pictures"].append(image(event) | {"seed": str(event.seed), "sha256": digest})
        case safelight.Finished():
            seen["reliable"].append("finished")
            seen["num_steps"] = event.usage.num_steps


def image(event: safelight.Preview | safelight.Picture) -> dict[str, Any]:
    """What a preview and a picture have in common."""
    names = ("output_index", "media_type", "width_px", "height_px", "stride_bytes")
    return {name: getattr(event, name) for name in names}


def now_us() -> int:
    """Microseconds since 1970, by this machine's clock."""
    return time.time_ns() // 1000


def measure_sync(case: dict[str, Any]) -> dict[str, Any]:
    """Sends the only request of a case by the client for programs without asyncio, and notes when previews come."""
    [request] = case["requests"]
    message = json_format.ParseDict(request, pb.GenerateRequest())
    received_us = []
    with safelight.SyncClient(case["targets"]) as client:
        spec = message.spec
        with client.generate(spec.prompt, steps=spec.num_inference_steps, preview=message.preview) as events:
            for event in events:
                if isinstance(event, safelight.Preview):
                    received_us.append(now_us())
    return {"case": case["name"], "generations": [{"code": "OK", "received_us": received_us}]}


if __name__ == "__main__":
    for line in sys.stdin:
        case = json.loads(line)
        report = measure_sync(case) if "--sync" in sys.argv else asyncio.run(run(case))
        print(json.dumps(report), flush=True)
