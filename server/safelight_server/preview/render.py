"""Makes previews of denoised latents, each at most once per method, encoding and size however many watch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from safelight_server.catalog import Pipeline
from safelight_server.picture import Encoded, encode, shrink
from safelight_server.pipeline import linear_image, to_pixels
from safelight_server.preview.policy import choose_method
from safelight_server.request import PixelEncoding, PreviewMethod
from safelight_server.runtime.base import Component, FloatArray

Decode = Callable[[int, FloatArray, Component], Awaitable[FloatArray | None]]
COMPONENTS = {
    PreviewMethod.TINY_DECODER: Component.PREVIEW_DECODER,
    PreviewMethod.FULL_DECODER: Component.DECODER,
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A preview that is ready to be sent."""

    output_index: int
    step: int
    method: PreviewMethod
    picture: Encoded


@dataclass(eq=False, slots=True)
class Frame:
    """How an output looks at a step.

    Attributes:
        output_id: the engine's.
        denoised: (C, h, w), a copy.
    """

    output_id: int
    output_index: int
    step: int
    denoised: FloatArray
    renders: dict[tuple[PreviewMethod, PixelEncoding, int | None], asyncio.Task[Rendered | None]] = field(
        default_factory=dict
    )


class Renderer:
    """Turns frames of one pipeline into previews.

    Args:
        decode: runs a decoder between the steps; None where a newer frame took its place.
        load: of the instances: 0 idle, 1 all busy.
        pool: threads for the pixels' work.
    """

    def __init__(self, pipeline: Pipeline, decode: Decode, load: Callable[[], float], pool: Executor) -> None:
        self._pipeline = pipeline
        self._decode = decode
        self._load = load
        self._pool = pool
        self.num_rendered = 0

    async def render(
        self, frame: Frame, wanted: PreviewMethod, encoding: PixelEncoding, max_edge_px: int | None
    ) -> Rendered | None:
        """The preview, or None where a newer frame took its place. Shared by all who ask for the same."""
        method = choose_method(wanted, self._load(), self._pipeline.has_preview_decoder)
        key = (method, encoding, max_edge_px)
        task = frame.renders.get(key)
        if task is None:
            task = frame.renders[key] = asyncio.create_task(self._make(frame, method, encoding, max_edge_px))
        return await asyncio.shield(task)

    async def _make(
        self, frame: Frame, method: PreviewMethod, encoding: PixelEncoding, max_edge_px: int | None
    ) -> Rendered | None:
        image: FloatArray | None = None
        if method is not PreviewMethod.LINEAR:
            image = await self._decode(frame.output_id, frame.denoised, COMPONENTS[method])
            if image is None:
                return None
        self.num_rendered += 1
        loop = asyncio.get_running_loop()
        picture = await loop.run_in_executor(self._pool, self._encode, frame, image, encoding, max_edge_px)
        return Rendered(frame.output_index, frame.step, method, picture)

    def _encode(
        self, frame: Frame, image: FloatArray | None, encoding: PixelEncoding, max_edge_px: int | None
    ) -> Encoded:
        if image is None:
            image = linear_image(self._pipeline, frame.denoised)
        return encode(shrink(to_pixels(image), max_edge_px), encoding)
