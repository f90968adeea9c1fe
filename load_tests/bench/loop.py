"""What sharing one event loop costs the denoiser (decision record 0002).

The server is a process of its own on the simulated runtime, with a probe in it.
The probe measures how late the loop wakes sleeping tasks, and how long an
instance is idle between two denoiser calls while outputs wait for their next
step. It measures that by the clock and by the CPU time of the loop's thread,
which is what a machine with a free core would show. One case has 2,000 streams,
most of them slow; the other has 64 outputs with latents, prompts and pictures of
Stable Diffusion 1.5's size.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
import numpy as np
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app.process import settle
from safelight_server.app.server import Running, serving
from safelight_server.domain.component import Component
from safelight_server.runtime import simulated
from safelight_server.settings import load
from safelight_server.telemetry import configure_logging

from load_tests.bench import processes, watchers
from load_tests.bench.requests import CHANNEL_OPTIONS
from load_tests.bench.runner import Report, Row

PROBE_S = 0.005
SD15 = {"LATENT": (4, 64, 64), "SIZE_PX": 512, "TOKENS": 77, "WIDTH": 768}
JPEG = pb.PreviewPolicy(accept=[pb.PixelEncoding(media_type="image/jpeg")], method=pb.PREVIEW_METHOD_LINEAR)
NO_PREVIEWS = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    num_streams: int = 2000
    num_healthy: int = 64
    num_outputs: int = 64
    step_ms: float = 200.0
    warm_up_s: float = 3.0
    seconds: float = 12.0


SMOKE = Plan(num_streams=6, num_healthy=2, num_outputs=2, step_ms=20.0, warm_up_s=0.2, seconds=0.5)


def measure(plan: Plan) -> Report:
    """Measures both cases, one after the other."""
    return Report("loop", {"Denoiser calls on a shared event loop": [_many_streams(plan), _large_latents(plan)]})


class Probe:
    """Measures a server from inside. It assumes one instance."""

    def __init__(self, running: Running) -> None:
        self._engine = running.generations._engine
        self._run = running.runtime.run
        self._ended: tuple[float, float] | None = None
        self._late: list[float] = []
        self._gaps: list[float] = []
        self._gaps_cpu: list[float] = []
        self._steps: list[float] = []
        running.runtime.run = self._watched  # type: ignore[method-assign]  # the probe sits in between
        self._sleeper = asyncio.create_task(self._sleep())
        self.reset()

    def reset(self) -> None:
        """Starts the measurement again."""
        self._late, self._gaps, self._gaps_cpu, self._steps = [], [], [], []
        self._from = time.monotonic(), time.process_time(), self._critical_s()

    def figures(self) -> Row:
        """The measurements since `reset`: times in milliseconds, and shares of the elapsed time."""
        elapsed, cpu = time.monotonic() - self._from[0], time.process_time() - self._from[1]
        figures = {
            "calls": len(self._gaps),
            "cpu_share": cpu / elapsed,
            "idle_share": sum(self._gaps) / elapsed,
            "critical_share": (self._critical_s() - self._from[2]) / elapsed,
        }
        seen = {"lag": self._late, "gap": self._gaps, "gap_cpu": self._gaps_cpu, "call": self._steps}
        for name, values in seen.items():
            for percent in (50, 99):
                figures[f"{name}_ms_p{percent}"] = 1e3 * float(np.percentile(values, percent)) if values else 0.0
        return figures

    def _critical_s(self) -> float:
        return float(self._engine._metrics.critical_seconds._value.get())

    async def _sleep(self) -> None:
        while True:
            until = time.monotonic() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self._late.append(time.monotonic() - until)

    async def _watched(self, instance, model, component, *rest):  # type: ignore[no-untyped-def]  # as Runtime.run
        if component is not Component.DENOISER:
            return await self._run(instance, model, component, *rest)
        began = time.monotonic()
        if self._ended is not None and self._engine.scheduler.num_outputs:
            self._gaps.append(began - self._ended[0])
            self._gaps_cpu.append(time.thread_time() - self._ended[1])
        try:
            return await self._run(instance, model, component, *rest)
        finally:
            self._ended = time.monotonic(), time.thread_time()
            self._steps.append(self._ended[0] - began)


def _many_streams(plan: Plan) -> Row:
    """Raw previews from the preview decoder, to the streams of `watchers`."""
    num_generations = -(-plan.num_streams // watchers.STREAMS_PER_GENERATION)
    num_slow = plan.num_streams - plan.num_healthy
    with processes.child(_serving, num_generations, plan.step_ms) as server:
        address, names = server.first()
        with (
            processes.child(watchers._watching, address, names, num_slow, watchers.SLOW_S) as slow,
            processes.child(watchers._watching, address, names, plan.num_healthy, 0.0) as healthy,
        ):
            slow.first()
            healthy.first()
            return _figures(server, f"{plan.num_streams} streams", plan)


def _large_latents(plan: Plan) -> Row:
    """Outputs of Stable Diffusion 1.5's size in calls of 20 ms + 1 ms a row, each with a stream of JPEGs."""
    with processes.child(_serving_large, plan.num_outputs) as server:
        address = server.first()
        with processes.child(_asking, address, plan.num_outputs) as client:
            client.first()
            return _figures(server, f"{plan.num_outputs} large outputs", plan)


def _figures(server: processes.Child, case: str, plan: Plan) -> Row:
    time.sleep(plan.warm_up_s)
    server.ask("reset")
    time.sleep(plan.seconds)
    return {"case": case, **server.ask("figures")}


async def _serving(pipe: Connection, num_generations: int, step_ms: float) -> None:
    configure_logging("json", "error")
    settings = load(
        port=0, runtime="simulated", simulated_base_ms=step_ms, simulated_row_ms=0.0, num_instances=1,
        max_running_outputs=num_generations, max_waiting_per_caller=num_generations, log_level="error",
        max_watchers=watchers.STREAMS_PER_GENERATION * 2, max_streams_per_caller=1 << 20,
    )  # fmt: skip
    async with serving(settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        names = []
        for number in range(num_generations):
            call = stub.Generate(_request(number, NO_PREVIEWS))
            names.append((await anext(aiter(call))).event.generation)
            call.cancel()
        settle()
        pipe.send((running.address, names))
        await _answer(pipe, Probe(running))


async def _serving_large(pipe: Connection, num_outputs: int) -> None:
    configure_logging("json", "error")
    for name, value in SD15.items():  # changes this process only
        setattr(simulated, name, value)
    settings = load(
        port=0, runtime="simulated", simulated_base_ms=20.0, simulated_row_ms=1.0, num_instances=1, log_level="error",
        max_running_outputs=num_outputs,
    )  # fmt: skip
    async with serving(settings) as running:
        settle()
        pipe.send(running.address)
        await _answer(pipe, Probe(running))


async def _answer(pipe: Connection, probe: Probe) -> None:
    async def work(question: str) -> object:
        if question == "figures":
            return probe.figures()
        probe.reset()
        return None

    await processes.answer(pipe, work)


async def _asking(pipe: Connection, address: str, num_outputs: int) -> None:
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel, asyncio.TaskGroup() as reading:
        stub = stubs.GenerationServiceStub(channel)
        streams = [aiter(stub.Generate(_request(number, JPEG))) for number in range(num_outputs)]
        for stream in streams:
            await anext(stream)
        pipe.send(None)
        for stream in streams:
            reading.create_task(_drain(stream))


async def _drain(stream) -> None:  # type: ignore[no-untyped-def]  # of responses
    async for _ in stream:
        pass


def _request(seed: int, preview: pb.PreviewPolicy) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt="x", num_inference_steps=watchers.STEPS, outputs=[pb.OutputSpec(seed=seed)]),
        disconnect=pb.DisconnectPolicy(action=pb.DisconnectPolicy.ACTION_DETACH),
        preview=preview,
        cache=pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS),
    )
