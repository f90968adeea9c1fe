"""Cheaper steps on `icons`: what guidance intervals, fewer steps and int8 save, and how they change the pictures.

The same captions and seeds are developed in every way, in chunks that take turns. `rows` are denoiser rows a picture,
as the server counts them; CPU is the server's. Pictures are compared with those of plain steps: the median of PSNR,
and what the judge of `training/evaluate.py` recognizes in them. The judge is trained on first use, which takes minutes,
and kept in out/evaluate; it needs the training environment, and so does int8, which is made at the start.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.quantization.quality import QualityOptions

from load_tests.bench import processes
from load_tests.bench.processes import Usage
from load_tests.bench.requests import COMPUTE, RAW
from load_tests.bench.runner import Report, Row
from training.icons import Spec, caption, sample_spec

PLAIN = "all rows"
INT8 = "models/icons@int8"
NONE = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
JUDGED = ("object", "colour", "background")

Pixels = npt.NDArray[np.uint8]


def _interval(start: float, end: float) -> pb.GenerationSpec:
    return pb.GenerationSpec(guidance_interval=pb.GuidanceInterval(start=start, end=end))


WAYS: Mapping[str, pb.GenerationSpec] = {
    PLAIN: pb.GenerationSpec(),
    "interval 0:0.8": _interval(0, 0.8),
    "interval 0:0.5": _interval(0, 0.5),
    "interval 0:0.25": _interval(0, 0.25),
    "interval 0.2:1": _interval(0.2, 1),
    "interval 0.2:0.8": _interval(0.2, 0.8),
    "interval 0.5:1": _interval(0.5, 1),
    "no guidance": pb.GenerationSpec(guidance_scale=1),
    "16 steps": pb.GenerationSpec(num_inference_steps=16),
    "10 steps": pb.GenerationSpec(num_inference_steps=10),
    "5 steps": pb.GenerationSpec(num_inference_steps=5),
    "int8": pb.GenerationSpec(model=INT8),
    "int8, interval 0:0.5": pb.GenerationSpec(model=INT8, guidance_interval=pb.GuidanceInterval(end=0.5)),
    "int8, 10 steps": pb.GenerationSpec(model=INT8, num_inference_steps=10),
    "rescale 0.7": pb.GenerationSpec(guidance_rescale=0.7),
    "guidance 7": pb.GenerationSpec(guidance_scale=7),
    "guidance 7, rescale 0.7": pb.GenerationSpec(guidance_scale=7, guidance_rescale=0.7),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `num_captions` in each way, in chunks of `chunk`."""

    num_captions: int = 200
    chunk: int = 40
    num_steps: int = 20
    num_clients: int = 16
    ways: tuple[str, ...] = tuple(WAYS)
    judge: bool = True
    models: Path = Path("models")


SMOKE = Plan(2, 1, 4, 1, (PLAIN, "interval 0:0.5"), judge=False)


class Developed(NamedTuple):
    """One picture, (H, W, 4), and its denoiser rows."""

    pixels: Pixels
    num_rows: int
    num_rows_skipped: int


@dataclass
class Way:
    """Measurements of one way to develop."""

    developed: list[Developed] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0


def measure(plan: Plan) -> Report:
    """Measures all ways; the table has a row for each."""
    rng = random.Random("cheaper")
    icons = [sample_spec(rng) for _ in range(plan.num_captions)]
    prompts = [caption(icon, rng, full=True) for icon in icons]
    ways = {name: Way() for name in plan.ways}
    judge = _trained_judge() if plan.judge else None  # first: a judge that is refused costs no measurement
    with (
        tempfile.TemporaryDirectory() as folder,
        processes.child(processes.obey) as clients,
        processes.child(processes.serve, {"models_dir": _models(plan, Path(folder))}) as server,
    ):
        clients.first()
        address = server.first()
        clients.ask(develop, address, plan, WAYS[PLAIN].SerializeToString(), prompts[:1], 0)  # warms up
        for first in range(0, plan.num_captions, plan.chunk):
            for name, way in ways.items():
                before: Usage = server.ask()
                asked = address, plan, WAYS[name].SerializeToString(), prompts[first : first + plan.chunk], first
                seconds, developed = clients.ask(develop, *asked)
                way.cpu_s += server.ask().cpu_s - before.cpu_s
                way.wall_s += seconds
                way.developed += developed
    right = judged(judge, ways, icons) if judge is not None else {}
    rows: list[Row] = [{**_row(name, way, ways[PLAIN]), **right.get(name, {})} for name, way in ways.items()]
    return Report("cheaper", {f"Cheaper steps, {plan.num_captions} captions": rows})


def _models(plan: Plan, folder: Path) -> Path:
    """The folder of models; a copy with a quantized revision of `icons` beside the float one, if a way needs it."""
    if all(WAYS[name].model != INT8 for name in plan.ways):
        return plan.models
    # the training environment has onnx, which the other parts do not need
    quantization = importlib.import_module("safelight_server.quantization.quantize")
    shutil.copytree(plan.models, folder / "models")
    [manifest] = (folder / "models" / "pipelines" / "icons").glob("*/pipeline.json")
    quantization.quantize(manifest, QualityOptions(), print)
    return folder / "models"


async def develop(
    address: str, plan: Plan, way: bytes, prompts: Sequence[str], first_seed: int
) -> tuple[float, list[Developed]]:
    """Clients request one picture after another; returns the seconds until all came, and the pictures in order."""
    numbers = iter(range(len(prompts)))
    developed: dict[int, Developed] = {}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)

        async def client() -> None:
            for number in numbers:
                spec = pb.GenerationSpec(prompt=prompts[number], num_inference_steps=plan.num_steps)
                spec.MergeFromString(way)
                spec.outputs.add(seed=first_seed + number)
                request = pb.GenerateRequest(spec=spec, preview=NONE, encoding=RAW, cache=COMPUTE)
                developed[number] = await _picture(stub, request)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(plan.num_clients)))
        return time.perf_counter() - began, [developed[number] for number in range(len(prompts))]


async def _picture(stub: stubs.GenerationServiceAsyncStub, request: pb.GenerateRequest) -> Developed:
    data, width = b"", 0
    async for response in stub.Generate(request):
        event = response.event
        if event.HasField("artifact_chunk"):
            data += event.artifact_chunk.data
            width = event.artifact_chunk.width_px
        usage = event.finished.usage
    pixels = np.frombuffer(data, np.uint8).reshape(-1, width, 4)
    return Developed(pixels, usage.num_rows, usage.num_rows_skipped)


def _trained_judge() -> object:
    """The classifier of `training/evaluate.py`; its module needs torch, which the other parts do not need."""
    return importlib.import_module("training.evaluate").trained_judge(Path("out/evaluate"))[0]


def judged(judge: object, ways: Mapping[str, Way], icons: Sequence[Spec]) -> dict[str, dict[str, float]]:
    """The share of pictures in which the judge finds the requested object, colour and background."""
    classifier, evaluate = (importlib.import_module(f"training.{name}") for name in ("classifier", "evaluate"))
    wanted = np.array([classifier.labels(icon) for icon in icons])
    right: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        pictures = np.stack([one.pixels[..., :3] for one in way.developed])
        found = evaluate.shares(wanted, classifier.predict(judge, classifier.shrink(pictures)))
        right[name] = {f"right_{head}": found[head] for head in JUDGED}
    return right


def _row(name: str, way: Way, plain: Way) -> dict[str, float | int | str]:
    count = len(way.developed)
    num_rows = sum(one.num_rows for one in way.developed)
    skipped = sum(one.num_rows_skipped for one in way.developed)
    pairs = zip(way.developed, plain.developed, strict=True)
    return {
        "way": name,
        "rows": num_rows / count,
        "rows_skipped": skipped / (num_rows + skipped),
        "cpu_ms_per_picture": 1e3 * way.cpu_s / count,
        "cpu_of_plain": way.cpu_s / plain.cpu_s,
        "wall_of_plain": way.wall_s / plain.wall_s,
        "psnr_db": "" if way is plain else statistics.median(psnr(one.pixels, other.pixels) for one, other in pairs),
    }


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; 100 for equal ones."""
    error = float(np.mean((one[..., :3].astype(np.float64) - other[..., :3]) ** 2))
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0
