"""An event log with real preview feeds, a decoder that the test can block, and streams that it reads step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from datetime import UTC, datetime

import numpy as np
from safelight.v1 import generation_pb2 as pb
from safelight_server.domain.component import Component
from safelight_server.domain.events import (
    Accepted,
    Finished,
    FinishReason,
    OutputFinished,
    Progress,
    Queued,
    Timings,
    Usage,
)
from safelight_server.domain.picture import EncodedPicture
from safelight_server.domain.request import MediaType, PixelEncoding, PreviewMethod, PreviewPolicy, Spec
from safelight_server.domain.tensors import FloatArray
from safelight_server.preview import FrameFeed
from safelight_server.runtime.simulated import LATENT, simulated_pipeline
from safelight_server.sampler import SamplerSpec
from safelight_server.stream import EventLog, Watcher

RAW = PixelEncoding(MediaType.RAW_RGBA8)
LINEAR = PreviewPolicy(encoding=RAW, method=PreviewMethod.LINEAR)
TINY = PreviewPolicy(encoding=RAW, method=PreviewMethod.TINY_DECODER)
NONE = PreviewPolicy(method=PreviewMethod.NONE)
SPEC = Spec(
    model="simulated",
    revision="1",
    prompt="x",
    negative_prompt="",
    token_ids=(1,),
    negative_token_ids=None,
    width_px=16,
    height_px=16,
    num_inference_steps=50,
    guidance_scale=1.0,
    sampler=SamplerSpec("ddim", "trailing"),
    seeds=(1,),
)
PICTURE = EncodedPicture(MediaType.RAW_RGBA8, 16, 16, 64, bytes(range(256)) * 16)
PIECE_BYTES = 1000
TURNS = 12
"""Turns of the event loop that `settle` waits; enough, since nothing here takes time."""


class Clock:
    """A clock that stands still until a test sets `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Here(Executor):
    """An executor that runs each function at once in the calling thread, so that tests are deterministic."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]  # as Executor declares it
        """Runs `fn` and returns a finished future."""
        future: Future[object] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  # an executor passes on every exception
            future.set_exception(error)
        return future


class Decoder:
    """A fake preview decoder. It answers at once; while `shut`, each call waits for `answer`."""

    def __init__(self) -> None:
        self.shut = False
        self.calls: list[Component] = []
        self.waiting: list[asyncio.Future[FloatArray | None]] = []
        self.on_call: Callable[[], None] = lambda: None

    async def __call__(self, latent: FloatArray, component: Component) -> FloatArray | None:
        """Decodes a latent to a grey image, with the signature of `Engine.preview`."""
        self.on_call()
        self.calls.append(component)
        if not self.shut:
            return self.image()
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        return await future

    def answer(self, *, superseded: bool = False) -> None:
        """Answers the oldest waiting call; with None, as for a preview that a newer one replaced, if `superseded`."""
        self.waiting.pop(0).set_result(None if superseded else self.image())

    @staticmethod
    def image() -> FloatArray:
        """A grey image of 8 x 8 pixels."""
        return np.zeros((3, 8, 8), np.float32)


class Stage:
    """An event log with its clock, decoder and preview feeds, and methods that publish as the engine does."""

    def __init__(self, max_watchers: int = 8) -> None:
        self.clock = Clock()
        self.decoder = Decoder()
        self.feeds: dict[int, FrameFeed] = {}
        self.log = EventLog("generations/x", self.clock, chunk_bytes=PIECE_BYTES, max_watchers=max_watchers)
        self.num_frames = 0

    @property
    def num_rendered(self) -> int:
        """Number of previews rendered so far."""
        return sum(feed.num_rendered for feed in self.feeds.values())

    def accept(self) -> None:
        """Publishes the first event, `Accepted`."""
        self.log.publish(Accepted(SPEC, "numerics", RAW, 1.0))

    def queue(self, position: int = 0) -> None:
        """Publishes its place in the queue."""
        self.log.publish(Queued(position, datetime(2026, 1, 1, tzinfo=UTC)))

    def step(self, step: int, output: int = 0) -> None:
        """Publishes the progress of a step, and its latent to the preview feed if a preview is due."""
        self.log.publish(Progress(output, step, 50, 1, 1.0))
        if output not in self.feeds:
            self.feeds[output] = FrameFeed(simulated_pipeline(), self.decoder, lambda: 0.0, Here())
            self.log.add_feed(output, self.feeds[output])
        if self.is_due(step, output):
            self.num_frames += 1
            self.feeds[output].frame(step, np.zeros(LATENT, np.float32))

    def is_due(self, step: int, output: int = 0) -> bool:
        """Whether the engine would copy the latent of this step for a preview."""
        return step >= self.feeds[output].next_due

    def end(self, output: int = 0, reason: FinishReason = FinishReason.COMPLETED) -> None:
        """Publishes the end of an output, without a picture."""
        self.log.publish(OutputFinished(output, reason, 0))

    def finish(self) -> None:
        """Publishes the last event, `Finished`."""
        self.log.publish(Finished(None, Usage(), Timings()))

    def complete(self, output: int = 0, *, last: bool = True) -> None:
        """Publishes an output's picture and its end, and with `last` the end of the generation."""
        self.log.artifact(output, PICTURE)
        self.end(output)
        if last:
            self.finish()


class Reader:
    """A client that takes one event at the test's command. In between, its stream is blocked at its `yield`."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.events: list[pb.GenerationEvent] = []
        self.ended = False
        self._stream = watcher.events()
        self._taking: asyncio.Task[bytes] | None = None

    @property
    def waits(self) -> bool:
        """Whether the client is ready for an event and its stream has none."""
        return self._taking is not None and not self._taking.done()

    async def take(self) -> pb.GenerationEvent | None:
        """Takes the next event; None if there is none yet, and the client then keeps waiting for it."""
        if self.ended:
            return None
        if self._taking is None:
            self._taking = asyncio.ensure_future(self._next())
        await settle()
        return self.collect()

    def collect(self) -> pb.GenerationEvent | None:
        """The event that has come since `take` began to wait, or None."""
        if self._taking is None or not self._taking.done():
            return None
        try:
            event = pb.GenerateResponse.FromString(self._taking.result()).event
        except StopAsyncIteration:
            self.ended = True
            return None
        finally:
            self._taking = None
        self.events.append(event)
        return event

    async def drain(self) -> list[pb.GenerationEvent]:
        """Takes all available events, and keeps waiting for the next."""
        before = len(self.events)
        while await self.take() is not None:
            pass
        return self.events[before:]

    async def leave(self) -> None:
        """Ends the stream, like a client that disconnects."""
        self.watcher.close()
        await settle()
        self.collect()
        await self._stream.aclose()

    async def _next(self) -> bytes:
        return await anext(self._stream)


async def settle() -> None:
    """Runs the event loop until nothing more can happen."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def kinds(events: list[pb.GenerationEvent]) -> list[str | None]:
    """The kinds of these events, by their names in the protocol."""
    return [event.WhichOneof("event") for event in events]


def previews(events: list[pb.GenerationEvent], output: int = 0) -> list[pb.Preview]:
    """The previews of an output."""
    return [event.preview for event in events if event.HasField("preview") and event.preview.output_index == output]


def picture(events: list[pb.GenerationEvent], output: int = 0) -> bytes:
    """The bytes of an output's picture that have come so far."""
    chunks = [event.artifact_chunk for event in events if event.HasField("artifact_chunk")]
    return b"".join(chunk.data for chunk in chunks if chunk.output_index == output)
