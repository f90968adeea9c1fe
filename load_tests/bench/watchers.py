"""2,000 streams on one server, most of them slow: the cost of a stream, and how late events reach healthy clients.

The server is a process of its own on the simulated runtime. The slow clients are
one process and the healthy ones another, so that slow clients cannot delay the
healthy ones themselves. Lateness is the time from the event's timestamp to its
arrival, by this machine's clock.
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
from safelight_server.app.server import serving
from safelight_server.settings import load
from safelight_server.telemetry import configure_logging

from load_tests.bench import processes
from load_tests.bench.processes import Usage
from load_tests.bench.requests import CHANNEL_OPTIONS, RAW
from load_tests.bench.runner import Report, Row

STREAMS_PER_GENERATION = 64
STREAMS_PER_CONNECTION = 50
OPENING_AT_ONCE = 50
STEPS = 1000
SLOW_S = 1.0
PREVIEW = pb.PreviewPolicy(accept=[RAW], method=pb.PREVIEW_METHOD_TINY_DECODER)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    num_streams: int = 2000
    num_healthy: int = 64
    step_ms: float = 200.0
    warm_up_s: float = 3.0
    seconds: float = 15.0


SMOKE = Plan(num_streams=6, num_healthy=2, step_ms=20.0, warm_up_s=0.2, seconds=0.5)


def measure(plan: Plan) -> Report:
    """Opens the slow streams, then the healthy ones, and measures for a while."""
    num_slow = plan.num_streams - plan.num_healthy
    num_generations = -(-plan.num_streams // STREAMS_PER_GENERATION)
    with processes.child(_serving, num_generations, plan.step_ms) as server:
        address, names = server.first()
        before: Usage = server.ask()
        with processes.child(_watching, address, names, num_slow, SLOW_S) as slow:
            slow.first()
            slow_opened_at = time.monotonic()
            opened: Usage = server.ask()
            with processes.child(_watching, address, names, plan.num_healthy, 0.0) as healthy:
                healthy.first()
                healthy_opened_at = time.monotonic()
                time.sleep(plan.warm_up_s)
                begun: Usage = server.ask()
                time.sleep(plan.seconds)
                ended: Usage = server.ask()
                late_ms = np.array(healthy.ask()) * 1e3
                healthy_s = time.monotonic() - healthy_opened_at
                num_slow_events = len(slow.ask())
                slow_s = time.monotonic() - slow_opened_at
    row: Row = {
        "streams": plan.num_streams,
        "healthy": plan.num_healthy,
        "kib_per_stream_at_first": (opened.resident_bytes - before.resident_bytes) / num_slow / 1024,
        "kib_per_stream": (ended.resident_bytes - before.resident_bytes) / plan.num_streams / 1024,
        "server_cpu_share": (ended.cpu_s - begun.cpu_s) / plan.seconds,
        "healthy_events_per_s": len(late_ms) / healthy_s,
        "slow_events_per_s": num_slow_events / slow_s,
        "late_ms_p50": float(np.percentile(late_ms, 50)),
        "late_ms_p99": float(np.percentile(late_ms, 99)),
    }
    return Report("watchers", {"Streams on one server, most of them slow": [row]})


async def _serving(pipe: Connection, num_generations: int, step_ms: float) -> None:
    configure_logging("json", "error")
    settings = load(
        port=0, runtime="simulated", simulated_base_ms=step_ms, simulated_row_ms=0.0, num_instances=1,
        max_running_outputs=num_generations, max_waiting_per_caller=num_generations, log_level="error",
        max_watchers=STREAMS_PER_GENERATION * 2, max_streams_per_caller=1 << 20,
    )  # fmt: skip
    async with serving(settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        message = pb.GenerateRequest(
            spec=pb.GenerationSpec(prompt="x", num_inference_steps=STEPS),
            disconnect=pb.DisconnectPolicy(action=pb.DisconnectPolicy.ACTION_DETACH),
            preview=pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE),
        )
        names = []
        for _ in range(num_generations):
            call = stub.Generate(message)
            names.append((await anext(aiter(call))).event.generation)
            call.cancel()
        settle()
        pipe.send((running.address, names))
        await processes.answer(pipe, processes.usage)


async def _watching(pipe: Connection, address: str, names: list[str], num_streams: int, pause_s: float) -> None:
    """Opens streams, evenly over the generations, and reads them, with a pause after each event."""
    late: list[float] = []
    channels = [
        grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) for _ in range(-(-num_streams // STREAMS_PER_CONNECTION))
    ]
    opening = asyncio.Semaphore(OPENING_AT_ONCE)
    opened = asyncio.Semaphore(0)

    async def read(number: int) -> None:
        stub = stubs.GenerationServiceStub(channels[number // STREAMS_PER_CONNECTION])
        request = pb.WatchGenerationRequest(name=names[number % len(names)], preview=PREVIEW)
        async with opening:
            call = stub.WatchGeneration(request)
            responses = aiter(call)
            await anext(responses)
        opened.release()
        async for response in responses:
            happened = response.event.event_time.ToNanoseconds() / 1e9
            late.append(time.time() - happened)
            if pause_s:
                await asyncio.sleep(pause_s)

    async with asyncio.TaskGroup() as reading:
        for number in range(num_streams):
            reading.create_task(read(number))
        for _ in range(num_streams):
            await opened.acquire()
        late.clear()
        pipe.send(None)
        await asyncio.to_thread(pipe.recv)
        pipe.send(late)
