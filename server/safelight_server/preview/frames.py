"""The frames of one execution (how its output looks at a step), and the previews that streams pull of the newest frame.

The execution hands a frame to its feed when the step is due, and `stream/previews.py`
requests previews of it. All generations that share an execution share its feed.
Invariants: a latent is decoded at most once per method, and scaled and encoded at
most once per method, encoding and size, however many streams request it; without
subscribers nothing is due and no frame is kept. Pixels are scaled and encoded in a
bounded pool of threads, not on the event loop. The exception is a linear preview that
is so small that handing it to a thread would cost the loop more.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import Executor
from dataclasses import dataclass, field

import structlog

from safelight_server.catalog.pipeline import Pipeline
from safelight_server.catalog.pixels import linear_image, to_pixels
from safelight_server.domain.component import Component
from safelight_server.domain.picture import EncodedPicture, Pixels, encode_within, shrink
from safelight_server.domain.request import PixelEncoding, PreviewMethod
from safelight_server.domain.tensors import FloatArray
from safelight_server.preview.policy import choose_method
from safelight_server.telemetry import tracing

log = structlog.get_logger(__name__)

MAX_PREVIEW_BYTES = 3_500_000
"""gRPC clients refuse messages over 4 MiB by default. The proto documents this bound at `PreviewPolicy`."""
SMALL_PX = 32 * 32
"""Up to this size a raw or JPEG preview costs 28 us of CPU on the loop, and 80 to 130 us in a thread (AVX-512)."""
Decode = Callable[[FloatArray, Component], Coroutine[None, None, FloatArray | None]]
COMPONENTS = {
    PreviewMethod.TINY_DECODER: Component.PREVIEW_DECODER,
    PreviewMethod.FULL_DECODER: Component.DECODER,
}


@dataclass(eq=False, slots=True)
class RenderedPreview:
    """A preview that is ready to be sent.

    Attributes:
        messages: the serialized event by generation and output, kept for the other streams once one has needed it.
    """

    step: int
    method: PreviewMethod
    picture: EncodedPicture
    messages: dict[tuple[str, int], bytes] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Frame:
    """How an output looks at a step, with the images and previews that were made of it.

    Attributes:
        step: steps made.
        denoised: estimate of the clean latent, (C, h, w), a copy.
        auto: the method that AUTO means for this frame, the same for all streams; None: no stream has used AUTO yet.
        images: decoded images, by method.
        previews: encoded previews, by method, encoding and largest edge in pixels.
    """

    step: int
    denoised: FloatArray
    auto: PreviewMethod | None = None
    images: dict[PreviewMethod, asyncio.Task[FloatArray | None]] = field(default_factory=dict)
    previews: dict[tuple[PreviewMethod, PixelEncoding, int | None], asyncio.Task[RenderedPreview | None]] = field(
        default_factory=dict
    )


class FrameFeed:
    """The newest frame of an execution, the streams that wait for frames, and the making of previews.

    Args:
        decode: runs a decoder between the steps; returns None if a newer frame replaced this one.
        load: share of instance time in demand: 0 idle, 1 all of it, more when work waits.
        pool: threads for scaling and encoding.
        on_pixels: called with the step and the pixels (H, W, 3) of each preview, in the thread that makes it.
        composite: changes the pixels (H, W, 3) of a preview before they are shown, in a thread; None: no change.

    Attributes:
        newest: the newest frame; None: no subscriber has needed a frame yet.
        next_due: the first step whose frame a subscriber needs; infinity: there is none. After a subscriber has left or
            changed its policy this may be one frame too early.
        num_rendered: previews made so far.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        decode: Decode,
        load: Callable[[], float],
        pool: Executor,
        on_pixels: Callable[[int, Pixels], None] | None = None,
        composite: Callable[[Pixels], Pixels] | None = None,
    ) -> None:
        self.newest: Frame | None = None
        self.next_due = math.inf
        self.num_rendered = 0
        self._pipeline = pipeline
        self._decode = decode
        self._load = load
        self._pool = pool
        self._on_pixels = on_pixels
        self._composite = composite
        self._subscribers: dict[Hashable, Callable[[int], float]] = {}
        self._decoded_step: dict[PreviewMethod, int] = {}

    # --- frames ---

    def frame(self, step: int, denoised: FloatArray) -> None:
        """Replaces the newest frame by the denoised latent (C, h, w) of a step that is due."""
        self.newest = Frame(step, denoised)
        self.next_due = min([offer(step) for offer in list(self._subscribers.values())], default=math.inf)

    def subscribe(self, subscriber: Hashable, first_due: float, offer: Callable[[int], float]) -> None:
        """Adds a subscriber, or replaces its subscription.

        Args:
            first_due: the first step whose frame it needs.
            offer: called with the step of each new frame; returns the next step whose frame it needs.
        """
        self._subscribers[subscriber] = offer
        self.next_due = min(self.next_due, first_due)

    def unsubscribe(self, subscriber: Hashable) -> None:
        """Removes a subscriber. Unknown subscribers are ignored."""
        self._subscribers.pop(subscriber, None)
        if not self._subscribers:
            self.newest, self.next_due = None, math.inf

    # --- previews ---

    def render(
        self, frame: Frame, wanted: PreviewMethod, encoding: PixelEncoding, max_edge_px: int | None
    ) -> asyncio.Task[RenderedPreview | None]:
        """The task that makes a preview of a frame; its result is None if a newer frame replaced it. Do not cancel it:
        other streams share it.
        """
        if wanted is PreviewMethod.AUTO:
            frame.auto = frame.auto or choose_method(wanted, self._load(), self._pipeline.has_preview_decoder)
            wanted = frame.auto
        key = wanted, encoding, max_edge_px
        if (task := frame.previews.get(key)) is None:
            task = frame.previews[key] = asyncio.create_task(self._make(frame, *key))
            task.add_done_callback(_log_failure)
        return task

    async def _make(
        self, frame: Frame, method: PreviewMethod, encoding: PixelEncoding, max_edge_px: int | None
    ) -> RenderedPreview | None:
        image: FloatArray | None = None
        if method is not PreviewMethod.LINEAR:
            if (decoding := frame.images.get(method)) is None:
                decoding = frame.images[method] = asyncio.create_task(self._decode_newest(frame, method))
            image = await decoding
            if image is None:
                return None
        self.num_rendered += 1
        with tracing.current().within("encode"):
            if image is None and self._composite is None and self._num_linear_px(frame.denoised) <= SMALL_PX:
                picture = self._encode(frame, None, encoding, max_edge_px)
            else:
                loop = asyncio.get_running_loop()
                picture = await loop.run_in_executor(self._pool, self._encode, frame, image, encoding, max_edge_px)
        return RenderedPreview(frame.step, method, picture)

    async def _decode_newest(self, frame: Frame, method: PreviewMethod) -> FloatArray | None:
        """Decodes a frame unless a newer one is being decoded: a slow stream must not delay newer frames."""
        if frame.step < self._decoded_step.get(method, 0):
            return None
        self._decoded_step[method] = frame.step
        return await self._decode(frame.denoised, COMPONENTS[method])

    def _num_linear_px(self, latent: FloatArray) -> int:
        _, height, width = latent.shape
        return int(height * width) * self._pipeline.manifest.linear_preview.block**2

    def _encode(
        self, frame: Frame, image: FloatArray | None, encoding: PixelEncoding, max_edge_px: int | None
    ) -> EncodedPicture:
        if image is None:
            image = linear_image(self._pipeline, frame.denoised)
        pixels = to_pixels(image)
        if self._composite is not None:
            pixels = self._composite(pixels)
        if self._on_pixels is not None:
            self._on_pixels(frame.step, pixels)
        return encode_within(shrink(pixels, max_edge_px), encoding, MAX_PREVIEW_BYTES)


def _log_failure(task: asyncio.Task[RenderedPreview | None]) -> None:
    # streams only miss a preview that fails, so nothing else would show the fault
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("preview_failed", exc_info=error)
