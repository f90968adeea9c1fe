"""Draws pictures in a terminal with half blocks (two pixels a character), in a grid that fits the screen.

A character is about twice as high as it is wide, so half of one is about
square. Does no I/O: the result depends on the pictures and the screen size only.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

GAP = 2
"""Spaces between two columns."""
LINES = 2
"""Lines of text with each picture: its title above, its progress below."""
LEAST_PX, MOST_PX = 10, 64
"""Smallest and largest edge of a picture."""
BAR = 8
"""Characters in a progress bar."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The layout: number of columns, their width in characters, edge of a picture in pixels (0: there is no room)."""

    columns: int
    width: int
    edge_px: int


@dataclass(frozen=True, slots=True)
class PictureTile:
    """One picture on the screen. `data` is in any format that Pillow reads; None before the first preview."""

    title: str
    progress: str
    data: bytes | None


class HalfBlocks:
    """A picture as a rich renderable, `edge_px` characters wide and half as many lines high."""

    def __init__(self, data: bytes, edge_px: int) -> None:
        pixels = Image.open(io.BytesIO(data)).convert("RGB").resize((edge_px, edge_px), Image.Resampling.BOX).tobytes()
        colors = [Color.from_rgb(*pixels[at : at + 3]) for at in range(0, len(pixels), 3)]
        self._edge_px = edge_px
        self._segments: list[Segment] = []
        for top in range(0, edge_px * edge_px, 2 * edge_px):
            for upper, lower in zip(
                colors[top : top + edge_px], colors[top + edge_px : top + 2 * edge_px], strict=True
            ):
                self._segments.append(Segment("▀", Style(color=upper, bgcolor=lower)))
            self._segments.append(Segment.line())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the characters with their colours."""
        yield from self._segments

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Returns the width, which is fixed."""
        return Measurement(self._edge_px, self._edge_px)


def layout(num_pictures: int, width: int, height: int) -> Grid:
    """The grid with the largest pictures that fit `width` characters and `height` lines; the last line stays free."""
    best = Grid(1, width, 0)
    for columns in range(1, num_pictures + 1):
        rows = -(-num_pictures // columns)
        across = (width - GAP * (columns - 1)) // columns
        edge = min(across, 2 * ((height - 1) // rows - LINES), MOST_PX) // 2 * 2
        if edge >= LEAST_PX and edge > best.edge_px:
            best = Grid(columns, across, edge)
    return best


def bar(step: int, num_steps: int) -> str:
    """A progress bar of `BAR` characters."""
    filled = round(BAR * step / num_steps)
    return "█" * filled + "░" * (BAR - filled)


def show(pictures: Sequence[PictureTile], width: int, height: int) -> RenderableType:
    """A grid of all pictures, or only their progress lines if the screen is too small for pictures."""
    grid = layout(len(pictures), width, height)
    if not grid.edge_px:
        return lines(pictures)
    table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    for _ in range(grid.columns):
        table.add_column(width=grid.width, no_wrap=True, overflow="ellipsis")
    cells = [_cell(picture, grid.edge_px) for picture in pictures]
    for first in range(0, len(cells), grid.columns):
        table.add_row(*cells[first : first + grid.columns])
    return table


def lines(pictures: Sequence[PictureTile]) -> RenderableType:
    """One line for each picture: its progress and its title."""
    return Group(*(Text(f"{shown.progress}  {shown.title}", no_wrap=True, overflow="ellipsis") for shown in pictures))


def _cell(shown: PictureTile, edge_px: int) -> RenderableType:
    picture = Text("\n" * (edge_px // 2 - 1)) if shown.data is None else _blocks(shown.data, edge_px)
    title = Text(shown.title, style="bold", no_wrap=True, overflow="ellipsis")
    return Group(title, picture, Text(shown.progress, no_wrap=True, overflow="ellipsis"))


@functools.lru_cache(maxsize=64)
def _blocks(data: bytes, edge_px: int) -> HalfBlocks:
    return HalfBlocks(data, edge_px)
