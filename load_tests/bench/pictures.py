"""Cost of a picture that starts from another one, compared with one from noise: server CPU and pictures a second.

All take the same steps, as strength is 1: so the difference is the encoder, the mixing at each step, and for masks the
pixels at the end. Uploads are made before. The kinds take turns, and "mixed" has a third of each.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from PIL import Image
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import images_pb2, images_pb2_grpc

from load_tests.bench import processes
from load_tests.bench.processes import Usage
from load_tests.bench.runner import Report, Row, median_by

NONE = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure; `pictures` for each client."""

    num_clients: tuple[int, ...] = (1, 8, 16)
    pictures: int = 12
    num_steps: int = 10
    rounds: int = 3
    models: Path = Path("models")


SMOKE = Plan(num_clients=(2,), pictures=1, num_steps=2, rounds=1)


def measure(plan: Plan) -> Report:
    """The table: kinds by number of clients, with the cost of each by that of text."""
    rows: list[Row] = []
    settings: dict[str, object] = {"models_dir": plan.models}
    with processes.child(processes.obey) as clients, processes.child(processes.serve, settings) as server:
        clients.first()
        address = server.first()
        kinds: Mapping[str, list[bytes]] = clients.ask(upload, address)
        for round_ in range(plan.rounds):
            for num_clients in plan.num_clients:
                for kind, specs in kinds.items():
                    before: Usage = server.ask()
                    seconds: float = clients.ask(develop, address, plan, num_clients, specs, round_)
                    cpu_s = server.ask().cpu_s - before.cpu_s
                    count = num_clients * plan.pictures
                    facts = {"pictures_per_s": count / seconds, "cpu_ms_per_picture": 1e3 * cpu_s / count}
                    rows.append({"clients": num_clients, "kind": kind, **facts})
    table = median_by(rows, ("clients", "kind"))
    text = {row["clients"]: float(row["cpu_ms_per_picture"]) for row in table if row["kind"] == "text"}
    table = [{**row, "of_text": float(row["cpu_ms_per_picture"]) / text[row["clients"]]} for row in table]
    return Report("pictures", {"Pictures from pictures, beside pictures from text": table})


async def upload(address: str) -> dict[str, list[bytes]]:
    """Uploads a picture and a mask; the specs of each kind, which clients take in turn."""
    across, down = np.meshgrid(np.arange(128), np.arange(128))
    photo = np.stack([2 * across, 2 * down, 255 - across], axis=2).astype(np.uint8)
    names = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = images_pb2_grpc.ImageServiceStub(channel)
        for pixels in (photo, (across > 64).astype(np.uint8) * 255):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            data = file.getvalue()
            whole = images_pb2.UploadImageRequest(
                sha256=hashlib.sha256(data).digest(), total_bytes=len(data), data=data
            )
            names.append((await stub.UploadImage(iter([whole]))).image.name)
    text, start = pb.GenerationSpec(), pb.GenerationSpec(init_image=names[0], strength=1.0)
    part = pb.GenerationSpec(init_image=names[0], strength=1.0, mask=names[1])
    kinds = {"text": [text], "img2img": [start], "inpainting": [part], "mixed": [text, start, part]}
    return {kind: [spec.SerializeToString() for spec in specs] for kind, specs in kinds.items()}


async def develop(address: str, plan: Plan, num_clients: int, specs: list[bytes], round_: int) -> float:
    """Each client requests its pictures one after another; returns the seconds until all clients have theirs."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)

        async def client(number: int) -> None:
            for picture in range(plan.pictures):
                spec = pb.GenerationSpec.FromString(specs[(number + picture) % len(specs)])
                spec.prompt, spec.num_inference_steps = "a red potion", plan.num_steps
                spec.outputs.add(seed=(round_ * plan.pictures + picture) * num_clients + number)
                request = pb.GenerateRequest(spec=spec, preview=NONE)
                request.cache.mode = pb.CachePolicy.MODE_BYPASS
                async for _ in stub.Generate(request):
                    pass

        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(num_clients)))
        return time.perf_counter() - began
