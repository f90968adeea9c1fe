"""Hostile callers, each a loop that runs until it is cancelled. Refusals do not stop them.

Each is a way in which one caller could once harm the others: a request that takes all slots, generations that are
started and left, floods of cache hits, streams that are not read, calls without a request, watches of health without
a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from load_tests.bench import processes

NO_PREVIEWS = pb.PreviewPolicy(method=pb.PREVIEW_METHOD_NONE)
RAW = pb.PixelEncoding(media_type="application/x-raw-rgba8")
REFUSED_PAUSE_S = 0.05
GENERATE = "/safelight.v1.GenerationService/Generate"
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]

Metadata = tuple[tuple[str, str], ...]
Attack = Callable[[str, Metadata, Counter[str]], Coroutine[Any, Any, None]]


async def hog(address: str, key: Metadata, seen: Counter[str]) -> None:
    """Sends one BATCH request after another, with as many outputs and steps as are allowed."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        for number in itertools.count():
            spec = pb.GenerationSpec(
                prompt=f"hog {number}",
                num_inference_steps=1000,
                outputs=[pb.OutputSpec(seed=number * 100 + index) for index in range(64)],
            )
            scheduling = pb.Scheduling(priority=pb.PRIORITY_BATCH)
            request = pb.GenerateRequest(spec=spec, preview=NO_PREVIEWS, scheduling=scheduling)
            await _counted("hog", seen, _first_minute(stub.Generate(request, metadata=key)))


async def leaver(address: str, key: Metadata, seen: Counter[str]) -> None:
    """Starts generations with a long grace period, and leaves each after its first event."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        for number in itertools.count():
            request = pb.GenerateRequest(
                spec=_spec(f"left {number}", number, steps=500),
                disconnect=pb.DisconnectPolicy(resume_grace={"seconds": 600}),  # type: ignore[arg-type]
                scheduling=pb.Scheduling(priority=pb.PRIORITY_INTERACTIVE),
            )
            call = stub.Generate(request, metadata=key)
            await _counted("leaver", seen, call.read())
            call.cancel()


async def flood(address: str, key: Metadata, seen: Counter[str]) -> None:
    """Requests the same picture with large labels as often as it can."""
    labels = {f"{index:02d}": "🔥" * 60 for index in range(16)}
    request = pb.GenerateRequest(spec=_spec("flood", 1, steps=1), preview=NO_PREVIEWS, labels=labels)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        while True:
            calls = [_counted("flood", seen, _drained(stub.Generate(request, metadata=key))) for _ in range(4)]
            await asyncio.gather(*calls)


async def sleeper(address: str, key: Metadata, seen: Counter[str]) -> None:
    """Opens streams of many pictures and reads none of them."""
    while True:
        async with grpc.aio.insecure_channel(address, SMALL_WINDOW) as channel:
            stub, calls = stubs.GenerationServiceStub(channel), []
            for number in range(20):
                spec = pb.GenerationSpec(
                    prompt=f"unread {number}",
                    num_inference_steps=2,
                    outputs=[pb.OutputSpec(seed=number * 100 + index) for index in range(16)],
                )
                call = stub.Generate(pb.GenerateRequest(spec=spec, encoding=RAW), metadata=key)
                await _counted("sleeper", seen, call.read())
                calls.append(call)
            await asyncio.sleep(20)
            for call in calls:
                call.cancel()


async def silent(address: str, key: Metadata, seen: Counter[str]) -> None:
    """Opens calls and sends only their headers."""
    while True:
        async with grpc.aio.insecure_channel(address) as channel:
            method: grpc.aio.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(GENERATE)
            calls = [method(metadata=(*key, ("x", "y" * 2000))) for _ in range(200)]
            await asyncio.sleep(15)
            for call in calls:
                call.cancel()
                seen["silent: opened"] += 1


async def watcher(address: str, key: Metadata, seen: Counter[str]) -> None:
    """Watches the health of services that do not exist, without a key."""
    while True:
        async with grpc.aio.insecure_channel(address) as channel:
            stub, calls = health_pb2_grpc.HealthStub(channel), []
            for number in range(200):
                call = stub.Watch(health_pb2.HealthCheckRequest(service=f"no.such.{number}"))
                await _counted("watcher", seen, call.read())
                calls.append(call)
            await asyncio.sleep(5)
            for call in calls:
                call.cancel()


async def nonsense(address: str, key: Metadata, seen: Counter[str]) -> None:
    """Sends faulty requests, wrong keys and malformed trace headers."""
    trace = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"), ("tracestate", '{"level": "info"}'))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stubs.GenerationServiceStub(channel)
        while True:
            faulty = pb.GenerateRequest(spec=pb.GenerationSpec(prompt="\x00" * 100, num_inference_steps=5_000_000))
            for metadata in (key, (("authorization", "Bearer wrong"),), (*key, *trace)):
                await _counted("nonsense", seen, _drained(stub.Generate(faulty, metadata=metadata)))
            await asyncio.sleep(0.05)


ATTACKS: tuple[Attack, ...] = (hog, leaver, flood, sleeper, silent, watcher, nonsense)


def _spec(prompt: str, seed: int, steps: int) -> pb.GenerationSpec:
    return pb.GenerationSpec(prompt=prompt, num_inference_steps=steps, outputs=[pb.OutputSpec(seed=seed)])


async def _first_minute(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> None:
    """Reads a stream for a minute, then cancels it."""
    try:
        async with asyncio.timeout(60):
            await _drained(call)
    except TimeoutError:
        call.cancel()


async def _drained(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> None:
    async for _ in call:
        pass


async def attack_all(pipe: Connection, address: str, keys: list[Metadata], names: list[str]) -> None:
    """A process of hostile callers. It answers each question with how their calls have ended so far.

    It has a low CPU priority, since real attackers would have machines of their own.
    """
    os.nice(10)
    seen: Counter[str] = Counter()
    chosen = [attack for attack in ATTACKS if attack.__name__ in names]
    tasks = [asyncio.create_task(attack(address, keys[at % len(keys)], seen)) for at, attack in enumerate(chosen)]

    async def counts() -> dict[str, int]:
        for task in tasks:
            if task.done():
                task.result()
        return dict(seen)

    pipe.send("ready")
    await processes.answer(pipe, counts)


async def _counted(who: str, seen: Counter[str], work: Awaitable[object]) -> None:
    """Awaits a call and counts how it ended; pauses a little after a refusal."""
    try:
        await work
        seen[f"{who}: OK"] += 1
    except grpc.aio.AioRpcError as error:
        seen[f"{who}: {error.code().name}"] += 1
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.sleep(REFUSED_PAUSE_S)
