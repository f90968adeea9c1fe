"""Requests of the tests of the triton runtime, and what their clients receive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs
from safelight.v1 import images_pb2_grpc

from tests.integration.test_images import MASK, PHOTO, name_of, pieces

PROMPTS = ("a red potion on a dark background", "a golden sword", "a blue shield with a star", "a wooden bow")
KINDS = (("ddim", 3.0), ("euler", 1.0), ("dpmpp_2m", 2.0), ("ddim", 1.0), ("euler_ancestral", 3.0))


@dataclass(slots=True)
class Seen:
    """What a client received of one generation."""

    steps: list[int] = field(default_factory=list)
    previews: list[int] = field(default_factory=list)
    data: bytes = b""
    usage: pb.Usage = field(default_factory=pb.Usage)
    numerics_id: str = ""
    largest_batch: int = 0

    @property
    def pixels(self) -> np.ndarray:
        """The picture's raw RGBA8 pixels."""
        return np.frombuffer(self.data, np.uint8)


def mixed(count: int, steps: Sequence[int] = (9, 12, 16)) -> list[pb.GenerateRequest]:
    """Requests of several samplers and numbers of steps, with and without guidance, that bypass the caches.

    Some start from `PHOTO`, some of these with `MASK`; strength 1 makes all steps.
    """
    cache = pb.CachePolicy(mode=pb.CachePolicy.MODE_BYPASS)
    requests = []
    for number in range(count):
        name, guidance = KINDS[number % len(KINDS)]
        spec = pb.GenerationSpec(
            prompt=PROMPTS[number % len(PROMPTS)],
            outputs=[pb.OutputSpec(seed=100 + number)],
            num_inference_steps=steps[number % len(steps)],
            guidance_scale=guidance,
            sampler=pb.SamplerSpec(name=name),
        )
        if number % 3:
            spec.init_image, spec.strength = name_of(PHOTO), 1.0
        if number % 3 == 2:
            spec.mask = name_of(MASK)
        requests.append(
            pb.GenerateRequest(spec=spec, cache=cache, encoding=pb.PixelEncoding(media_type="application/x-raw-rgba8"))
        )
    return requests


async def develop(
    stub: stubs.GenerationServiceStub,
    request: pb.GenerateRequest,
    seen: Seen | None = None,
    timeout: float | None = None,
) -> Seen:
    """Runs one generation to its end."""
    seen = seen or Seen()
    async for response in stub.Generate(request, timeout=timeout):
        event = response.event
        match event.WhichOneof("event"):
            case "accepted":
                seen.numerics_id = event.accepted.numerics_id
            case "progress":
                seen.steps.append(event.progress.step)
                seen.largest_batch = max(seen.largest_batch, event.progress.batch_size)
            case "preview":
                seen.previews.append(event.preview.step)
            case "artifact_chunk":
                seen.data += event.artifact_chunk.data
            case "finished":
                seen.usage = event.finished.usage
    return seen


async def develop_all(address: str, requests: Sequence[pb.GenerateRequest]) -> list[Seen]:
    """Runs all requests at once."""
    async with grpc.aio.insecure_channel(address) as channel:
        await upload_all(channel)
        stub = stubs.GenerationServiceStub(channel)
        return list(await asyncio.gather(*(develop(stub, request) for request in requests)))


async def upload_all(channel: grpc.aio.Channel) -> None:
    """Uploads the init image and the mask of the requests of `mixed`."""
    for data in (PHOTO, MASK):
        await images_pb2_grpc.ImageServiceStub(channel).UploadImage(iter(pieces(data)))


class Load:
    """Running generations, whose progress a test can check."""

    def __init__(self, channel: grpc.aio.Channel, requests: Sequence[pb.GenerateRequest]) -> None:
        self.requests = requests
        self.seen = [Seen() for _ in requests]
        uploading = asyncio.create_task(upload_all(channel))

        async def call(request: pb.GenerateRequest, seen: Seen) -> None:
            await uploading
            await develop(stubs.GenerationServiceStub(channel), request, seen)

        self._calls = [
            asyncio.create_task(call(request, seen)) for request, seen in zip(requests, self.seen, strict=True)
        ]

    def reached(self, step: int) -> Callable[[], bool]:
        """Whether every generation has made that many steps, or has ended."""
        return lambda: all(
            call.done() or (seen.steps or [0])[-1] >= step for seen, call in zip(self.seen, self._calls, strict=True)
        )

    @property
    def num_running(self) -> int:
        """Number of generations that have not ended."""
        return sum(not call.done() for call in self._calls)

    async def finish(self) -> list[Seen]:
        """Waits for all; raises the error of any that failed."""
        await asyncio.gather(*self._calls)
        return self.seen


def assert_exact(requests: Sequence[pb.GenerateRequest], seen: Sequence[Seen], undisturbed: Sequence[Seen]) -> None:
    """Checks that every step was made, reported and counted once, and that the pixels are those of an undisturbed run."""
    for request, one, other in zip(requests, seen, undisturbed, strict=True):
        steps = request.spec.num_inference_steps
        rows = steps * (2 if request.spec.guidance_scale != 1.0 else 1)
        assert (one.usage.num_steps, one.usage.num_rows) == (steps, rows)
        assert one.steps == sorted(set(one.steps))
        assert one.steps[-1] == steps
        assert one.data
        assert np.array_equal(one.pixels, other.pixels)
