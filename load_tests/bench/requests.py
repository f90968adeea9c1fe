"""Safelight clients of the benchmarks: send requests, receive raw pictures and note when their pixels arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

PROMPT = "a red potion on a dark background"
RAW = pb.PixelEncoding(media_type="application/x-raw-rgba8")
COMPUTE = pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS)
METHODS = {
    "none": pb.PREVIEW_METHOD_NONE,
    "linear": pb.PREVIEW_METHOD_LINEAR,
    "tiny": pb.PREVIEW_METHOD_TINY_DECODER,
    "auto": pb.PREVIEW_METHOD_AUTO,
}
CHANNEL_OPTIONS = [
    ("grpc.http2.bdp_probe", 0),  # with lookahead: previews wait at the server, where newer ones replace older ones
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.use_local_subchannel_pool", 1),
]


class NoPicture(Exception):
    """A server refused or failed a request; the message has its error."""


@dataclass(frozen=True, slots=True)
class Seen:
    """When a client got pixels, on `time.perf_counter`; without previews the first pixels are the picture's."""

    first_pixel: float
    picture: float


@dataclass(frozen=True, slots=True)
class Asked:
    """Measurements of a closed loop of clients."""

    wall_s: float
    num_pictures: int
    num_previews: int


def request(seed: int, num_steps: int, previews: str) -> pb.GenerateRequest:
    """A request for one guided picture, with previews of every step or none, all raw RGBA8. It bypasses the caches."""
    policy = pb.PreviewPolicy(method=METHODS[previews], accept=[] if previews == "none" else [RAW])
    spec = pb.GenerationSpec(prompt=PROMPT, num_inference_steps=num_steps, outputs=[pb.OutputSpec(seed=seed)])
    return pb.GenerateRequest(spec=spec, preview=policy, encoding=RAW, cache=COMPUTE)


async def closed_loop(address: str, num_clients: int, num_pictures: int, num_steps: int, previews: str) -> Asked:
    """Runs `num_clients` clients that request one picture after another, until `num_pictures` were requested."""
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        await channel.channel_ready()
        stub = stubs.GenerationServiceStub(channel)
        seeds = iter(range(num_pictures))
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_client(stub, seeds, num_steps, previews)) for _ in range(num_clients)]
        wall_s = time.perf_counter() - began
    return Asked(wall_s, num_pictures, sum(task.result() for task in tasks))


async def _client(stub: stubs.GenerationServiceAsyncStub, seeds: Iterator[int], num_steps: int, previews: str) -> int:
    num_previews = 0
    for seed in seeds:
        async for response in stub.Generate(request(seed, num_steps, previews)):
            num_previews += response.event.HasField("preview")
    return num_previews


async def watch(stub: stubs.GenerationServiceAsyncStub, seed: int, num_steps: int) -> Seen:
    """Requests one picture with AUTO previews and watches it.

    Raises:
        NoPicture: the request was refused or failed.
    """
    first = picture = 0.0
    try:
        async for response in stub.Generate(request(seed, num_steps, "auto")):
            event = response.event
            if event.HasField("preview") or event.HasField("artifact_chunk"):
                picture = time.perf_counter()
                first = first or picture
    except grpc.aio.AioRpcError as error:
        raise NoPicture(error.details()) from None
    return Seen(first, picture)
