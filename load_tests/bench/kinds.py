"""The cost of each kind of request relative to plain text, alone and mixed in one batch; and how long exports take.

The kinds take turns, and all make the same number of steps: an init image has strength 1. For a mixed kind, clients
request the kinds in turn, so that their steps share batches. Uploads are made before the measurement. Exports are of
small random pipelines; they need the training environment and are left out without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from PIL import Image
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import images_pb2, images_pb2_grpc
from safelight_server.quantization.quality import QualityOptions

from load_tests.bench import processes
from load_tests.bench.processes import Usage
from load_tests.bench.runner import Report, Row, median_by

NONE = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
PLAIN = "text"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `pictures` for each client. `folders` are those of `tests/training/folders.py` to export."""

    num_clients: tuple[int, ...] = (1, 8, 16)
    pictures: int = 12
    num_steps: int = 10
    rounds: int = 3
    models: Path = Path("models")
    folders: tuple[str, ...] = ("pipeline", "sdxl_pipeline")


SMOKE = Plan(num_clients=(2,), pictures=1, num_steps=2, rounds=1, folders=())


def measure(plan: Plan) -> Report:
    """Measures two tables: kinds by number of clients, with costs relative to text; and exports."""
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
                    seconds, num_rows = clients.ask(develop, address, plan, num_clients, specs, round_)
                    cpu_s = server.ask().cpu_s - before.cpu_s
                    count = num_clients * plan.pictures
                    facts = {"pictures_per_s": count / seconds, "cpu_ms_per_picture": 1e3 * cpu_s / count}
                    rows.append({"clients": num_clients, "kind": kind, "rows": num_rows / count, **facts})
    table = median_by(rows, ("clients", "kind"))
    plain = {row["clients"]: row for row in table if row["kind"] == PLAIN}
    table = [{**row, **_of_plain(row, plain[row["clients"]])} for row in table]
    tables: dict[str, Sequence[Row]] = {"Kinds of pictures, beside plain ones": table}
    notes = []
    if plan.folders and importlib.util.find_spec("diffusers") is not None:
        tables["Exports of small pipelines"] = [_exported(name) for name in plan.folders]
    elif plan.folders:
        notes.append("left out, as torch is not here: exports")
    return Report("kinds", tables, notes=notes)


def _of_plain(row: Mapping[str, float | int | str], plain: Mapping[str, float | int | str]) -> dict[str, float]:
    cost, rate = "cpu_ms_per_picture", "pictures_per_s"
    return {"cpu_of_text": float(row[cost]) / float(plain[cost]), "rate_of_text": float(row[rate]) / float(plain[rate])}


async def upload(address: str) -> dict[str, list[bytes]]:
    """Uploads a picture and a mask; returns the specs of each kind, which clients use in turn."""
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
    half = pb.GenerationSpec(guidance_interval=pb.GuidanceInterval(start=0, end=0.5))
    samplers = [pb.GenerationSpec(sampler=pb.SamplerSpec(name=name)) for name in SAMPLERS]
    kinds = {
        PLAIN: [text],
        "samplers mixed": samplers,
        "interval 0:0.5": [half],
        "interval beside text": [text, half],
        "img2img": [start],
        "img2img beside text": [text, start],
        "inpainting": [part],
        "all mixed": [*samplers, half, start, part],
    }
    return {kind: [spec.SerializeToString() for spec in specs] for kind, specs in kinds.items()}


async def develop(address: str, plan: Plan, num_clients: int, specs: list[bytes], round_: int) -> tuple[float, int]:
    """Each client requests its pictures one after another; returns the seconds until the end, and the denoiser rows."""
    num_rows = 0
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)

        async def client(number: int) -> None:
            nonlocal num_rows
            for picture in range(plan.pictures):
                spec = pb.GenerationSpec.FromString(specs[(number + picture) % len(specs)])
                spec.prompt, spec.num_inference_steps = "a red potion", plan.num_steps
                spec.outputs.add(seed=(round_ * plan.pictures + picture) * num_clients + number)
                request = pb.GenerateRequest(spec=spec, preview=NONE)
                request.cache.mode = pb.CachePolicy.MODE_BYPASS
                async for response in stub.Generate(request):
                    usage = response.event.finished.usage
                num_rows += usage.num_rows

        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(num_clients)))
        return time.perf_counter() - began, num_rows


def _exported(name: str) -> Row:
    """Exports a small pipeline and quantizes it; the row has the time of both."""
    # they have torch, which the other parts do without
    folders = importlib.import_module("tests.training.folders")
    exporter = importlib.import_module("safelight_server.export.exporter")
    quantization = importlib.import_module("safelight_server.quantization.quantize")
    plan = importlib.import_module("safelight_server.export.plan")
    with tempfile.TemporaryDirectory() as scratch:
        folder, models = Path(scratch) / "small", Path(scratch) / "models"
        pipeline = getattr(folders, name)()
        pipeline.save_pretrained(folder)
        began = time.perf_counter()
        options = plan.ExportOptions("small", licence="CC0-1.0", steps=4)
        exporter.export(folder, models, options)
        exported = time.perf_counter()
        gate = QualityOptions(num_pictures=4, min_psnr_db=0.0)
        quantization.quantize(models / "pipelines" / "small" / "1" / "pipeline.json", gate)
        quantized = time.perf_counter()
        num_bytes = sum(file.stat().st_size for file in models.glob("repository/*/1/*"))
    return {
        "pipeline": type(pipeline).__name__,
        "mib": num_bytes / 2**20,
        "export_s": exported - began,
        "quantize_s": quantized - exported,
    }
