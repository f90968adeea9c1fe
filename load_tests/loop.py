"""What sharing one event loop costs the denoiser: `python -m load_tests.loop` prints both cases (decision 0002).

The server is a process of its own on the simulated runtime, with a probe in
it: how late the loop wakes who sleeps, and how long an instance stands still
between two denoiser calls while outputs wait for their next step, by the clock
and by the processor time of the loop's thread, which is what a machine with a
core to spare would show. One case has
2,000 streams, most of them slow; the other 64 outputs with latents, prompts and
pictures of Stable Diffusion 1.5's size.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app import Running, serving
from safelight_server.runtime import simulated
from safelight_server.runtime.base import Component
from safelight_server.settings import load

from load_tests import watchers

PROBE_S = 0.005
SECONDS = 12.0
OUTPUTS, STEPS = 64, 400
SD15 = {"LATENT": (4, 64, 64), "SIZE_PX": 512, "TOKENS": 77, "WIDTH": 768}
JPEG = pb.PreviewPolicy(accept=[pb.PixelEncoding(media_type="image/jpeg")], method=pb.PREVIEW_METHOD_LINEAR)


class Probe:
    """Measures a server from inside. One instance is assumed."""

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
        """Forgets what it has seen."""
        self._late, self._gaps, self._gaps_cpu, self._steps = [], [], [], []
        self._from = time.monotonic(), time.process_time(), self._critical_s()

    def figures(self) -> dict[str, float]:
        """In milliseconds, and shares of the time since `reset`."""
        elapsed, cpu = time.monotonic() - self._from[0], time.process_time() - self._from[1]
        figures = {"calls": len(self._gaps), "cpu_share": cpu / elapsed, "idle_share": sum(self._gaps) / elapsed}
        figures["critical_share"] = (self._critical_s() - self._from[2]) / elapsed
        seen = {"lag": self._late, "gap": self._gaps, "gap_cpu": self._gaps_cpu, "call": self._steps}
        for name, values in seen.items():
            for percent in (50, 99, 100):
                figures[f"{name}_ms_p{percent}"] = 1e3 * float(np.percentile(values, percent)) if values else 0.0
        figures["load_of_machine"] = os.getloadavg()[0]
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


def many_watchers(num_streams: int = 2000, num_healthy: int = 64) -> dict[str, float]:
    """2,000 streams on 32 outputs whose calls take 200 ms; raw previews from the preview decoder."""
    num_generations = -(-num_streams // watchers.STREAMS_PER_GENERATION)
    server, pipe = watchers._start(_serving_watchers, num_generations)
    address, names = pipe.recv()
    clients, pipes = [], []
    for num, pause_s in ((num_streams - num_healthy, watchers.SLOW_S), (num_healthy, 0.0)):
        client, client_pipe = watchers._start(watchers._watching, address, names, num, pause_s)
        client_pipe.recv()
        clients.append(client)
        pipes.append(client_pipe)  # a client ends when nobody holds its pipe
    return _figures(pipe, [*clients, server])


def large_latents() -> dict[str, float]:
    """64 outputs of Stable Diffusion 1.5's size in calls of 20 ms + 1 ms a row, each with a stream of JPEGs."""
    server, pipe = watchers._start(_serving_large)
    client, client_pipe = watchers._start(_asking, pipe.recv())
    client_pipe.recv()
    return _figures(pipe, [client, server])


def _figures(pipe: Connection, processes: list) -> dict[str, float]:  # type: ignore[type-arg]  # of SpawnProcess
    time.sleep(watchers.WARM_UP_S)
    watchers._ask(pipe)
    time.sleep(SECONDS)
    figures: dict[str, float] = watchers._ask(pipe)
    for process in processes:
        process.kill()
        process.join()
    return figures


async def _serving_watchers(pipe: Connection, num_generations: int) -> None:
    settings = load(
        port=0, runtime="simulated", simulated_base_ms=watchers.STEP_MS, simulated_row_ms=0.0, num_instances=1,
        max_running_outputs=num_generations, max_waiting_per_caller=num_generations, log_level="error",
        max_watchers=watchers.STREAMS_PER_GENERATION * 2, max_streams_per_caller=1 << 20, models_dir=Path("models"),
    )  # fmt: skip
    async with serving(settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        names = []
        for number in range(num_generations):
            call = stub.Generate(_request(number, watchers.STEPS, pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)))
            names.append((await anext(aiter(call))).event.generation)
            call.cancel()
        pipe.send((running.address, names))
        await _answer(pipe, Probe(running))


async def _serving_large(pipe: Connection) -> None:
    for name, value in SD15.items():  # of this process only
        setattr(simulated, name, value)
    settings = load(
        port=0, runtime="simulated", simulated_base_ms=20.0, simulated_row_ms=1.0, num_instances=1, log_level="error",
        max_running_outputs=OUTPUTS, models_dir=Path("models"),
    )  # fmt: skip
    async with serving(settings) as running:
        pipe.send(running.address)
        await _answer(pipe, Probe(running))


async def _answer(pipe: Connection, probe: Probe) -> None:
    answers: list[Callable[[], object]] = [probe.reset, probe.figures]
    for answer in answers:
        await asyncio.to_thread(pipe.recv)
        pipe.send(answer())
    await asyncio.to_thread(pipe.recv)


async def _asking(pipe: Connection, address: str) -> None:
    async with grpc.aio.insecure_channel(address, watchers.CLIENT_OPTIONS) as channel, asyncio.TaskGroup() as reading:
        stub = stubs.GenerationServiceStub(channel)
        calls = [stub.Generate(_request(number, STEPS, JPEG)) for number in range(OUTPUTS)]
        streams = [aiter(call) for call in calls]
        for stream in streams:
            await anext(stream)
        pipe.send(None)
        for stream in streams:
            reading.create_task(_drain(stream))


async def _drain(stream) -> None:  # type: ignore[no-untyped-def]  # of responses
    async for _ in stream:
        pass


def _request(seed: int, steps: int, preview: pb.PreviewPolicy) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        spec=pb.GenerationSpec(prompt="x", num_inference_steps=steps, outputs=[pb.OutputSpec(seed=seed)]),
        disconnect=pb.DisconnectPolicy(action=pb.DisconnectPolicy.ACTION_DETACH),
        preview=preview,
        cache=pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS),
    )


if __name__ == "__main__":
    for case in (large_latents, many_watchers):
        print(case.__name__, json.dumps({name: round(value, 3) for name, value in case().items()}), flush=True)
