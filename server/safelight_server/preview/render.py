"""Makes previews of denoised latents, each at most once per method, encoding and size however many watch.

Between the streams, which ask (`stream/previews.py`), and the engine, which
decodes between the steps. Pixels are scaled and encoded in a bounded pool of
threads, not on the event loop, except those of a linear preview so small that
the loop would work longer at handing it over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor

import structlog

from safelight_server.catalog.catalog import Pipeline
from safelight_server.catalog.pixels import linear_image, to_pixels
from safelight_server.domain.component import Component
from safelight_server.domain.picture import EncodedPicture, encode_within, shrink
from safelight_server.domain.request import PixelEncoding, PreviewMethod
from safelight_server.domain.tensors import FloatArray
from safelight_server.preview.frames import Frame, RenderedPreview
from safelight_server.preview.policy import choose_method
from safelight_server.telemetry import tracing

log = structlog.get_logger(__name__)

MAX_PREVIEW_BYTES = 3_500_000
"""gRPC clients refuse messages over 4 MiB unless told otherwise. Said in the proto at `PreviewPolicy`."""
SMALL_PX = 32 * 32
"""Made on the loop as raw or JPEG it costs 28 us of CPU, by a thread 80 to 130 us in all (AVX-512 machine)."""
Decode = Callable[[FloatArray, Component], Coroutine[None, None, FloatArray | None]]
COMPONENTS = {
    PreviewMethod.TINY_DECODER: Component.PREVIEW_DECODER,
    PreviewMethod.FULL_DECODER: Component.DECODER,
}


class Renderer:
    """Turns the frames of one output into previews.

    Args:
        decode: runs a decoder between the steps; None where a newer frame took its place.
        load: share of instance time asked for: 0 idle, 1 all of it, more when work waits.
        pool: threads for the pixels' work.

    Attributes:
        num_rendered: previews made so far.
    """

    def __init__(self, pipeline: Pipeline, decode: Decode, load: Callable[[], float], pool: Executor) -> None:
        self._pipeline = pipeline
        self._decode = decode
        self._load = load
        self._pool = pool
        self._decoded_step: dict[PreviewMethod, int] = {}
        self.num_rendered = 0

    def render(
        self, frame: Frame, wanted: PreviewMethod, encoding: PixelEncoding, max_edge_px: int | None
    ) -> asyncio.Task[RenderedPreview | None]:
        """The preview, or None where a newer frame took its place. Shared: do not cancel it."""
        if wanted is PreviewMethod.AUTO:
            frame.auto = frame.auto or choose_method(wanted, self._load(), self._pipeline.has_preview_decoder)
            wanted = frame.auto
        method = wanted
        return frame.render(
            (method, encoding, max_edge_px), lambda: _task(self._make(frame, method, encoding, max_edge_px))
        )

    async def _make(
        self, frame: Frame, method: PreviewMethod, encoding: PixelEncoding, max_edge_px: int | None
    ) -> RenderedPreview | None:
        image: FloatArray | None = None
        if method is not PreviewMethod.LINEAR:
            image = await frame.image(method, lambda: asyncio.create_task(self._decode_newest(frame, method)))
            if image is None:
                return None
        self.num_rendered += 1
        loop = asyncio.get_running_loop()
        with tracing.current().within("encode"):
            if image is None and self._num_linear_px(frame.denoised) <= SMALL_PX:
                picture = self._encode(frame, None, encoding, max_edge_px)
            else:
                picture = await loop.run_in_executor(self._pool, self._encode, frame, image, encoding, max_edge_px)
        return RenderedPreview(frame.step, method, picture)

    async def _decode_newest(self, frame: Frame, method: PreviewMethod) -> FloatArray | None:
        """Decodes a frame unless a newer one is on its way: a stream that lags must not take another's place."""
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
        return encode_within(shrink(to_pixels(image), max_edge_px), encoding, MAX_PREVIEW_BYTES)


def _task(making: Coroutine[None, None, RenderedPreview | None]) -> asyncio.Task[RenderedPreview | None]:
    task = asyncio.create_task(making)
    task.add_done_callback(_report)
    return task


def _report(task: asyncio.Task[RenderedPreview | None]) -> None:
    """A preview that cannot be made costs its streams that preview and nothing else; someone must hear of it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("preview_failed", exc_info=error)
