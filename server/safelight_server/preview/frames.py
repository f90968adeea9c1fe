"""A frame: how one output looks at one step, and all that was made of it.

Generations that share an execution share its frames. Invariant: whatever is
made of a frame is made at most once, however many ask, and is kept only as
long as the frame is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from safelight_server.domain.picture import EncodedPicture
from safelight_server.domain.request import PixelEncoding, PreviewMethod
from safelight_server.domain.tensors import FloatArray

Key = tuple[PreviewMethod, PixelEncoding, int | None]


class FrameRenderer(Protocol):
    """Makes previews of the frames of one output; see `render.Renderer`."""

    def render(
        self, frame: Frame, wanted: PreviewMethod, encoding: PixelEncoding, max_edge_px: int | None
    ) -> asyncio.Task[RenderedPreview | None]:
        """The preview of a frame."""


@dataclass(eq=False, slots=True)
class RenderedPreview:
    """A preview that is ready to be sent.

    Attributes:
        messages: its event in serialized form, by generation and output, once a stream has needed it; kept for the
            other streams.
    """

    step: int
    method: PreviewMethod
    picture: EncodedPicture
    messages: dict[tuple[str, int], bytes] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Frame:
    """How an output looks at a step.

    Attributes:
        step: steps made.
        denoised: (C, h, w), a copy.
        auto: what AUTO means for this frame, once it was asked for: the same for all streams.
    """

    renderer: FrameRenderer
    step: int
    denoised: FloatArray
    auto: PreviewMethod | None = None
    _images: dict[PreviewMethod, asyncio.Task[FloatArray | None]] = field(default_factory=dict)
    _renders: dict[Key, asyncio.Task[RenderedPreview | None]] = field(default_factory=dict)

    def preview(
        self, wanted: PreviewMethod, encoding: PixelEncoding, max_edge_px: int | None
    ) -> asyncio.Task[RenderedPreview | None]:
        """The preview, or None where a newer frame took its place. Shared: do not cancel it."""
        return self.renderer.render(self, wanted, encoding, max_edge_px)

    def image(
        self, method: PreviewMethod, start: Callable[[], asyncio.Task[FloatArray | None]]
    ) -> asyncio.Task[FloatArray | None]:
        """The decoded image, shared by all encodings; `start` begins it for the first."""
        if (task := self._images.get(method)) is None:
            task = self._images[method] = start()
        return task

    def render(
        self, key: Key, start: Callable[[], asyncio.Task[RenderedPreview | None]]
    ) -> asyncio.Task[RenderedPreview | None]:
        """The preview of this key, shared by all streams; `start` begins it for the first."""
        if (task := self._renders.get(key)) is None:
            task = self._renders[key] = start()
        return task
