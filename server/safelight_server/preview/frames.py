"""A frame: how one output looks at one step, and all that was made of it.

Invariant: whatever is made of a frame is made at most once, however many ask,
and is kept only as long as the frame is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from safelight_server.picture import Encoded
from safelight_server.request import PixelEncoding, PreviewMethod
from safelight_server.runtime.base import FloatArray

Key = tuple[PreviewMethod, PixelEncoding, int | None]


@dataclass(eq=False, slots=True)
class Rendered:
    """A preview that is ready to be sent.

    Attributes:
        message: its event in serialized form, once a stream has needed it; kept for the other streams.
    """

    output_index: int
    step: int
    method: PreviewMethod
    picture: Encoded
    message: bytes | None = None


@dataclass(eq=False, slots=True)
class Frame:
    """How an output looks at a step.

    Attributes:
        output_id: the engine's.
        denoised: (C, h, w), a copy.
        auto: what AUTO means for this frame, once it was asked for: the same for all streams.
    """

    output_id: int
    output_index: int
    step: int
    denoised: FloatArray
    auto: PreviewMethod | None = None
    _images: dict[PreviewMethod, asyncio.Task[FloatArray | None]] = field(default_factory=dict)
    _renders: dict[Key, asyncio.Task[Rendered | None]] = field(default_factory=dict)

    def image(
        self, method: PreviewMethod, start: Callable[[], asyncio.Task[FloatArray | None]]
    ) -> asyncio.Task[FloatArray | None]:
        """The decoded image, shared by all encodings; `start` begins it for the first."""
        if (task := self._images.get(method)) is None:
            task = self._images[method] = start()
        return task

    def render(self, key: Key, start: Callable[[], asyncio.Task[Rendered | None]]) -> asyncio.Task[Rendered | None]:
        """The preview of this key, shared by all streams; `start` begins it for the first."""
        if (task := self._renders.get(key)) is None:
            task = self._renders[key] = start()
        return task
