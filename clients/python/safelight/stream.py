"""The result of `Client.generate`: the events of one generation, and shorthands for its pictures."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Self

from safelight.events import Event, Picture

if TYPE_CHECKING:
    import PIL.Image


class GenerationStream:
    """An async iterator of events. Closing it, or leaving its loop, closes the stream at the server."""

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Ends the stream. The server suspends a generation whose last stream was closed, then cancels it."""
        await self._events.aclose()

    async def pictures(self) -> list[Picture]:
        """Waits for all pictures, in the order of the outputs.

        Raises:
            GenerationError: the request was refused, the generation failed, or it could not be resumed.
        """
        async with aclosing(self):
            pictures = [event async for event in self if isinstance(event, Picture)]
        return sorted(pictures, key=lambda picture: picture.output_index)

    async def picture(self) -> Picture:
        """Waits for the first picture.

        Raises:
            GenerationError: the request was refused, the generation failed, or it could not be resumed.
        """
        return (await self.pictures())[0]

    async def image(self) -> PIL.Image.Image:
        """Waits for the first picture and decodes it with Pillow (the extra `safelight[images]`).

        Raises:
            GenerationError: the request was refused, the generation failed, or it could not be resumed.
            ModuleNotFoundError: Pillow is not installed.
        """
        return (await self.picture()).image()
