"""2,000 streams on one server, most of them slow: what a stream costs, and how late a healthy one is.

The server is a process of its own on the simulated runtime; the slow and the
healthy clients are one process each, so that a late event is the server's
doing. Lateness is from an event's own time to its arrival, on one machine's
clock.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import grpc
import numpy as np
import uvloop
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight_server.app import serving
from safelight_server.settings import load

STREAMS_PER_GENERATION = 64
STREAMS_PER_CONNECTION = 50
OPENING_AT_ONCE = 50
STEP_MS = 200.0
STEPS = 1000
SLOW_S = 1.0
WARM_UP_S = 3.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
CLIENT_OPTIONS = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.use_local_subchannel_pool", 1),
]
RAW = pb.PixelEncoding(media_type="application/x-raw-rgba8")
PREVIEW = pb.PreviewPolicy(accept=[RAW], method=pb.PREVIEW_METHOD_TINY_DECODER)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the server's process has used."""

    resident_bytes: int
    cpu_s: float


def measure(num_streams: int = 2000, num_healthy: int = 64, seconds: float = 15.0) -> dict[str, float]:
    """Runs it and returns the figures."""
    num_generations = -(-num_streams // STREAMS_PER_GENERATION)
    server, server_pipe = _start(_serving, num_generations)
    address, names = server_pipe.recv()
    before = _ask(server_pipe)
    slow, slow_pipe = _start(_watching, address, names, num_streams - num_healthy, SLOW_S)
    slow_pipe.recv()
    opened = _ask(server_pipe)
    healthy, healthy_pipe = _start(_watching, address, names, num_healthy, 0.0)
    healthy_pipe.recv()
    time.sleep(WARM_UP_S)
    begun = _ask(server_pipe)
    time.sleep(seconds)
    ended = _ask(server_pipe)
    late = np.array(_ask(healthy_pipe)) * 1e3
    num_slow_events = len(_ask(slow_pipe))
    for process in (slow, healthy, server):
        process.kill()
        process.join()
    return {
        "streams": num_streams,
        "healthy": num_healthy,
        "kib_per_stream_at_first": (opened.resident_bytes - before.resident_bytes) / (num_streams - num_healthy) / 1024,
        "kib_per_stream": (ended.resident_bytes - before.resident_bytes) / num_streams / 1024,
        "server_cpu_share": (ended.cpu_s - begun.cpu_s) / seconds,
        "healthy_events_per_s": len(late) / (seconds + WARM_UP_S),
        "slow_events_per_s": num_slow_events / (seconds + WARM_UP_S),
        "late_ms_p50": float(np.percentile(late, 50)),
        "late_ms_p99": float(np.percentile(late, 99)),
    }


def _start(main: Callable[..., Coroutine[None, None, None]], *args: object) -> tuple[SpawnProcess, Connection]:
    """A process of its own, and the pipe to it; reading from the pipe fails when the process ends."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_run, args=(main, theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _run(main: Callable[..., Coroutine[None, None, None]], *args: object) -> None:
    uvloop.run(main(*args))


def _ask(pipe: Connection):  # type: ignore[no-untyped-def]  # whatever the other side answers
    pipe.send(None)
    return pipe.recv()


async def _serving(pipe: Connection, num_generations: int) -> None:
    settings = load(
        port=0, runtime="simulated", simulated_base_ms=STEP_MS, simulated_row_ms=0.0, num_instances=1,
        max_running_outputs=num_generations, max_waiting_per_caller=num_generations, log_level="error",
        max_watchers=STREAMS_PER_GENERATION * 2, max_streams_per_caller=1 << 20, models_dir=Path("models"),
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
        pipe.send((running.address, names))
        while True:
            await asyncio.to_thread(pipe.recv)
            pipe.send(_usage())


def _usage() -> Usage:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    return Usage(resident, time.process_time())


async def _watching(pipe: Connection, address: str, names: list[str], num_streams: int, pause_s: float) -> None:
    """Opens streams, evenly over the generations, and reads them, with a pause after each event."""
    late: list[float] = []
    channels = [
        grpc.aio.insecure_channel(address, CLIENT_OPTIONS) for _ in range(-(-num_streams // STREAMS_PER_CONNECTION))
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
