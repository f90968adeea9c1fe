"""`make bench`: throughput against the bare loop, and the scheduler against the ideal, side by side in one run.

Prints tables and writes out/bench/result.json. Figures are ratios of medians
of interleaved rounds: machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server import catalog as catalogs
from safelight_server.app import serving
from safelight_server.pipeline import decoder_latent, to_pixels
from safelight_server.runtime.base import Component
from safelight_server.runtime.onnx import _session as onnx_session
from safelight_server.sampler import SamplerSpec, advance, compile_table, gaussian, guide
from safelight_server.settings import load

from load_tests import watchers

PROMPT = "a red potion on a dark background"
STEPS = 20
ROUNDS = 3
CLIENTS = (1, 4, 16)
SCHEDULER_LOADS = (16, 64, 256)


def request(seed: int, previews: str) -> pb.GenerateRequest:
    """A guided generation of 20 steps; raw pictures, previews of every step or none."""
    method = {"none": pb.PREVIEW_METHOD_NONE, "linear": pb.PREVIEW_METHOD_LINEAR, "auto": pb.PREVIEW_METHOD_AUTO}
    raw = pb.PixelEncoding(media_type="application/x-raw-rgba8")
    accept = [] if previews == "none" else [raw]
    return pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt=PROMPT, num_inference_steps=STEPS, outputs=[pb.OutputSpec(seed=seed)]),
        preview=pb.PreviewPolicy(method=method[previews], accept=accept),
        encoding=raw,
    )


async def ask(address: str, clients: int, images: int, previews: str) -> None:
    """`clients` clients that ask one after another, `images` pictures together."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        seeds = iter(range(images))

        async def client() -> None:
            for seed in seeds:
                async for _ in stub.Generate(request(seed, previews)):
                    pass

        await asyncio.gather(*(client() for _ in range(clients)))


def ask_process(address: str, clients: int, images: int, previews: str) -> None:
    """The clients in a process of their own, so that their CPU is not the server's."""
    asyncio.run(ask(address, clients, images, previews))


def load_bare(models: Path) -> None:
    """The same sessions without a server: no gRPC, no scheduler, no previews; one thread a core."""
    pipeline = catalogs.load(models).get("")
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        sessions = list(pool.map(lambda _: _sessions(pipeline), range(workers)))
        _BARE.clear()
        _BARE.update(pipeline=pipeline, sessions=sessions)


_BARE: dict[str, object] = {}


def _sessions(pipeline):  # type: ignore[no-untyped-def]
    return {component: onnx_session(file) for component, file in pipeline.files.items()}


def run_bare(batch: int, images: int) -> None:
    """Develops `images` pictures, `batch` at a time on each core."""
    pipeline, sessions = _BARE["pipeline"], _BARE["sessions"]
    groups = [list(range(start, min(start + batch, images))) for start in range(0, images, batch)]
    shares = [groups[worker :: len(sessions)] for worker in range(len(sessions))]
    with ThreadPoolExecutor(len(sessions)) as pool:
        list(pool.map(lambda at: [_develop(pipeline, sessions[at[0]], g) for g in at[1]], enumerate(shares)))


def _develop(pipeline, sessions, seeds) -> None:  # type: ignore[no-untyped-def]
    manifest, rows = pipeline.manifest, len(seeds)
    at = manifest.defaults.sampler
    spec = SamplerSpec(at.name, at.spacing, at.sigma_schedule, at.eta)
    table = compile_table(spec, pipeline.schedule, manifest.prediction_type, STEPS)
    size = manifest.sizes[0]
    shape = pipeline.latent_shape(size.width_px, size.height_px)
    ids = np.array([pipeline.tokenizer.encode(text).ids for text in (PROMPT, "")], np.int64)
    context = sessions[Component.TEXT_ENCODER].run(["last_hidden_state"], {"input_ids": ids})[0]
    context = np.repeat(context, rows, axis=0)
    x = np.stack([np.float32(table.init_scale) * gaussian(seed, 0, 0, shape) for seed in seeds])
    denoised = np.zeros_like(x)
    scale = np.full(rows, manifest.defaults.guidance_scale, np.float32)
    for step in range(STEPS):
        feed = {
            "sample": np.concatenate([x, x]) * table.in_scale[step],
            "timestep": np.full(2 * rows, table.timesteps[step], np.float32),
            "encoder_hidden_states": context,
        }
        prediction = sessions[Component.DENOISER].run(None, feed)[0]
        guided = guide(prediction[:rows], prediction[rows:], scale)
        x, denoised = advance(x, guided, denoised, None, np.repeat(table.coefficients[step : step + 1], rows, 0))
    for image in sessions[Component.DECODER].run(None, {"latent": decoder_latent(pipeline, x)})[0]:
        to_pixels(image)


def timed(work) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Wall and own CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


async def throughput(models: Path, console: Console) -> list[dict[str, float | str]]:
    """(a) images per second, and per CPU second of the server, against the bare loop."""
    rows: list[dict[str, float | str]] = []
    load_bare(models)
    spawn = multiprocessing.get_context("spawn")
    async with serving(load(port=0, models_dir=models, log_level="error", max_running_outputs=64)) as running:
        for clients in CLIENTS:
            images = max(8, 3 * clients)
            samples: dict[str, list[tuple[float, float]]] = {"bare": [], "linear": [], "auto": []}
            for _ in range(ROUNDS):
                group = max(1, clients // len(os.sched_getaffinity(0)))
                samples["bare"].append(await asyncio.to_thread(timed, functools.partial(run_bare, group, images)))
                for previews in ("linear", "auto"):
                    process = spawn.Process(target=ask_process, args=(running.address, clients, images, previews))
                    wall, cpu = time.perf_counter(), time.process_time()
                    process.start()
                    await asyncio.to_thread(process.join)
                    samples[previews].append((time.perf_counter() - wall, time.process_time() - cpu))
            bare_cpu = statistics.median(cpu for _, cpu in samples["bare"])
            for name, measured in samples.items():
                wall = statistics.median(wall for wall, _ in measured)
                cpu = statistics.median(cpu for _, cpu in measured)
                rows.append(
                    {
                        "clients": clients,
                        "what": name,
                        "images_per_s": images / wall,
                        "images_per_cpu_s": images / cpu,
                        "of_bare_per_cpu_s": bare_cpu / cpu,
                    }
                )
    _print(console, "throughput: previews every step against the bare loop", rows)
    return rows


async def scheduling(console: Console) -> list[dict[str, float | str]]:
    """(c) steps per second on the simulated curve of 20 ms + 1 ms a row, against batches that are always full."""
    rows: list[dict[str, float | str]] = []
    for outputs in SCHEDULER_LOADS:
        settings = load(
            port=0, runtime="simulated", num_instances=1, log_level="error", max_running_outputs=outputs,
            max_waiting_per_caller=1024, max_waiting_standard=1024,
        )  # fmt: skip
        async with serving(settings) as running, grpc.aio.insecure_channel(running.address) as channel:
            stub = stubs.GenerationServiceStub(channel)
            steps = 40 if outputs < 256 else 20
            message = pb.GenerateRequest(
                spec=pb.GenerationSpec(prompt=PROMPT, num_inference_steps=steps),
                preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE),
            )

            async def one(message=message, stub=stub) -> pb.Timings:  # type: ignore[no-untyped-def]
                return [r.event async for r in stub.Generate(message)][-1].finished.timings

            began, cpu = time.perf_counter(), time.process_time()
            timings = await asyncio.gather(*(one() for _ in range(outputs)))
            wall = max(t.denoise.ToNanoseconds() for t in timings) / 1e9
            cpu = time.process_time() - cpu
            batch = min(outputs, 64)
            ideal = outputs * steps / batch * (0.020 + 0.001 * batch)
            rows.append(
                {
                    "generations": outputs,
                    "steps_per_s": outputs * steps / wall,
                    "of_ideal": ideal / wall,
                    "gateway_cpu_ms_per_row_step": 1e3 * cpu / (outputs * steps),
                    "total_s": time.perf_counter() - began,
                }
            )
    _print(console, "scheduler on the simulated runtime, 20 ms + 1 ms a row", rows)
    return rows


def _print(console: Console, title: str, rows: list[dict[str, float | str]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", choices=("throughput", "scheduling", "watchers"))
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    console = Console()
    load_before = os.getloadavg()[0]
    result: dict[str, object] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {load_before:.1f} before",
    }
    if options.only in (None, "scheduling"):
        result["scheduling"] = asyncio.run(scheduling(console))
    if options.only in (None, "throughput"):
        result["throughput"] = asyncio.run(throughput(options.models, console))
    if options.only in (None, "watchers"):
        figures = watchers.measure()
        _print(
            console,
            "2,000 streams on one server, most of them slow",
            [{"what": n, "figure": f} for n, f in figures.items()],
        )
        result["watchers"] = figures
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
