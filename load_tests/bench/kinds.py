"""The cost of each kind of request relative to plain text, alone and mixed in one batch; and how long exports take.

The kinds take turns, and all make the same number of steps: an init image has strength 1. For a mixed kind, clients
request the kinds in turn, so that their steps share batches. Uploads are made before the measurement. Adapters,
controls and image prompts are measured with a small random pipeline, whose parts have the proportions of Stable
Diffusion 1.5. It and the exports need the training environment and are left out without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import io
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
from PIL import Image
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import images_pb2, images_pb2_grpc
from safelight_server.catalog.manifest import Manifest
from safelight_server.export.options import AdapterLayers, ExportOptions
from safelight_server.quantization.quality import QualityOptions

from load_tests.bench import processes
from load_tests.bench.processes import Usage
from load_tests.bench.runner import Report, Row, median_by
from tests.support.adapters import safetensors

NONE = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
PLAIN = "text"
CONTROLS = ("edges", "depth")
ADAPTERS = tuple(f"random-{number}" for number in range(8))
ADAPTER_RANK = 8
Upload = Callable[[str], Awaitable[dict[str, list[bytes]]]]
"""Makes the specs of each kind for the server at an address."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `pictures` for each client. `folders` are those of `tests/training/folders.py` to export.

    The model with adapters, controls and image prompts is larger, so it makes fewer pictures, of fewer steps.
    """

    num_clients: tuple[int, ...] = (1, 8, 16)
    pictures: int = 12
    num_steps: int = 10
    rounds: int = 3
    models: Path = Path("models")
    folders: tuple[str, ...] = ("pipeline", "sdxl_pipeline")
    conditions: bool = True
    condition_pictures: int = 3
    condition_steps: int = 5


SMOKE = Plan(num_clients=(2,), pictures=1, num_steps=2, rounds=1, folders=(), conditions=False)


def measure(plan: Plan) -> Report:
    """Measures up to three tables: kinds by number of clients, relative to text, of two models; and exports."""
    tables: dict[str, Sequence[Row]] = {"Kinds of pictures, beside plain ones": _of_kinds(plan, plan.models, upload)}
    notes = []
    has_torch = importlib.util.find_spec("diffusers") is not None
    if plan.conditions and has_torch:
        with tempfile.TemporaryDirectory() as scratch:
            models = _conditioned(Path(scratch))
            shorter = replace(plan, pictures=plan.condition_pictures, num_steps=plan.condition_steps)
            tables["Adapters, controls and image prompts"] = _of_kinds(shorter, models, upload_conditions)
    if plan.folders and has_torch:
        tables["Exports of small pipelines"] = [_exported(name) for name in plan.folders]
    if (plan.folders or plan.conditions) and not has_torch:
        notes.append("left out, as torch is not here: adapters, controls and image prompts; exports")
    return Report("kinds", tables, notes=notes)


def _of_kinds(plan: Plan, models: Path, upload: Upload) -> Sequence[Row]:
    """Costs by kind and number of clients."""
    rows: list[Row] = []
    settings: dict[str, object] = {"models_dir": models}
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
    return [{**row, **_of_plain(row, plain[row["clients"]])} for row in table]


def _of_plain(row: Mapping[str, float | int | str], plain: Mapping[str, float | int | str]) -> dict[str, float]:
    cost, rate = "cpu_ms_per_picture", "pictures_per_s"
    return {"cpu_of_text": float(row[cost]) / float(plain[cost]), "rate_of_text": float(row[rate]) / float(plain[rate])}


async def upload(address: str) -> dict[str, list[bytes]]:
    """Uploads a picture and a mask; returns the specs of each kind, which clients use in turn."""
    names = await _upload_both(address)
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


async def upload_conditions(address: str) -> dict[str, list[bytes]]:
    """Uploads two pictures; returns the specs of each kind for the model of `_conditioned`."""
    names = await _upload_both(address)
    edges, depth = (pb.Control(name=name, image=image, scale=0.5) for name, image in zip(CONTROLS, names, strict=True))
    early = pb.Control(name=edges.name, image=edges.image, scale=0.5, end=0.5)
    text, adapted = pb.GenerationSpec(), [pb.GenerationSpec(adapters=[pb.Adapter(name=name)]) for name in ADAPTERS]
    one, two, half = (pb.GenerationSpec(controls=controls) for controls in ([edges], [edges, depth], [early]))
    prompted = pb.GenerationSpec(image_prompt=pb.ImagePrompt(image=names[0]))
    kinds = {
        PLAIN: [text],
        "adapter": adapted[:1],
        "adapter beside text": [text, adapted[0]],
        "eight adapters": adapted,
        "control": [one],
        "control 0:0.5": [half],
        "control beside text": [text, one],
        "two controls": [two],
        "image prompt": [prompted],
        "image prompt beside text": [text, prompted],
        "all mixed": [text, *adapted[:2], one, half, two, prompted],
    }
    return {kind: [spec.SerializeToString() for spec in specs] for kind, specs in kinds.items()}


async def _upload_both(address: str) -> list[str]:
    """Uploads a picture and a mask; returns their names."""
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
    return names


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


def _conditioned(place: Path) -> Path:
    """Exports a small random pipeline with room for adapters, two control networks and an IP-Adapter.

    Its UNet has the blocks of Stable Diffusion 1.5 with a fifth of their channels, on latents of 16 x 16.
    """
    folders = importlib.import_module("tests.training.folders")
    exporter = importlib.import_module("safelight_server.export.exporter")
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    unet = folders.unet(
        sample_size=16,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        down_block_types=(*[cross.format("Down")] * 3, plain.format("Down")),
        up_block_types=(plain.format("Up"), *[cross.format("Up")] * 3),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    folders.pipeline(unet=unet).save_pretrained(place / "folder")
    for seed, name in enumerate(CONTROLS):
        folders.control_network(unet, seed).save_pretrained(place / name)
    options = ExportOptions(
        "conditioned",
        licence="CC0-1.0",
        max_rows=32,
        adapter_rank=ADAPTER_RANK,
        adapter_layers=AdapterLayers.ATTENTION,
        controls=tuple((name, place / name) for name in CONTROLS),
        image_prompt=folders.ip_adapter(unet, place / "ip"),
    )
    exporter.export(place / "folder", place / "models", options)
    [path] = (place / "models").glob("pipelines/*/*/pipeline.json")
    room = Manifest.model_validate_json(path.read_bytes()).adapters
    assert room is not None
    for seed, name in enumerate(ADAPTERS):
        rng, matrices = np.random.default_rng(seed), {}
        for target in room.targets:
            for part, shape in (("A", (ADAPTER_RANK, target.inputs)), ("B", (target.outputs, ADAPTER_RANK))):
                key = f"base_model.model.{target.name}.lora_{part}.weight"
                matrices[key] = 0.05 * rng.standard_normal(shape, np.float32)
        adapter = place / "models" / "adapters" / name
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_bytes(safetensors(matrices))
    return place / "models"


def _exported(name: str) -> Row:
    """Exports a small pipeline and quantizes it; the row has the time of both."""
    # they have torch, which the other parts do without
    folders = importlib.import_module("tests.training.folders")
    exporter = importlib.import_module("safelight_server.export.exporter")
    quantization = importlib.import_module("safelight_server.quantization.quantize")
    with tempfile.TemporaryDirectory() as scratch:
        folder, models = Path(scratch) / "small", Path(scratch) / "models"
        pipeline = getattr(folders, name)()
        pipeline.save_pretrained(folder)
        began = time.perf_counter()
        options = ExportOptions("small", licence="CC0-1.0", steps=4)
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
