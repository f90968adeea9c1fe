"""Pictures in a terminal fit any size, with the right colours and proportions."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safelight_server.cli.terminal import LEAST_PX, LINES, PictureTile, layout, show

BUSY = "████████ 20/20 ×6 390 ms"


def picture(upper: tuple[int, int, int], lower: tuple[int, int, int]) -> bytes:
    image = Image.new("RGB", (128, 128), upper)
    image.paste(lower, (0, 64, 128, 128))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def printed(width: int, height: int, shown: list[PictureTile]) -> list[list[tuple[str, object]]]:
    """Lines of segments."""
    console = Console(width=width, height=height, color_system="truecolor", force_terminal=True, file=io.StringIO())
    lines = console.render_lines(show(shown, width, height), pad=False)
    return [[(segment.text, segment.style) for segment in line] for line in lines]


@given(num_pictures=st.integers(1, 12), width=st.integers(1, 300), height=st.integers(1, 100))
def test_a_grid_fits_its_screen(num_pictures, width, height):
    grid = layout(num_pictures, width, height)
    rows = -(-num_pictures // grid.columns)
    assert grid.edge_px % 2 == 0
    assert grid.edge_px == 0 or grid.edge_px >= LEAST_PX
    assert grid.edge_px <= grid.width
    assert grid.edge_px == 0 or rows * (grid.edge_px // 2 + LINES) < height
    assert grid.width * grid.columns <= width


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 45), (120, 30), (200, 60), (40, 10), (20, 5)])
def test_six_pictures_stay_within_the_screen(width, height):
    data = picture((250, 0, 0), (0, 0, 250))
    lines = printed(
        width, height, [PictureTile("a purple crystal gem with sparkles on a dark background", BUSY, data)] * 6
    )
    assert len(lines) < max(height, 7)
    assert max(sum(len(text) for text, _ in line) for line in lines) <= width


def test_on_eighty_columns_all_six_are_seen_with_their_figures():
    data = picture((250, 0, 0), (0, 0, 250))
    lines = printed(80, 24, [PictureTile("a golden key", BUSY, data)] * 6)
    text = ["".join(text for text, _ in line) for line in lines]
    assert sum(line.count("▀" * 18) for line in text) == 6 * 9
    assert sum(line.count(BUSY) for line in text) == 6


def test_a_picture_is_square_and_has_its_colours_from_top_to_bottom():
    lines = printed(20, 14, [PictureTile("x", "", picture((250, 0, 0), (0, 0, 250)))])
    blocks = [[style for text, style in line if text == "▀"] for line in lines]
    blocks = [line for line in blocks if line]
    assert len(blocks[0]) == 2 * len(blocks)
    colours = [(line[0].color.get_truecolor(), line[0].bgcolor.get_truecolor()) for line in blocks]
    assert colours == [((250, 0, 0), (250, 0, 0))] * 5 + [((0, 0, 250), (0, 0, 250))] * 5


def test_before_the_first_preview_the_room_is_kept():
    empty, full = (
        printed(80, 24, [PictureTile("x", "waiting", data)] * 6) for data in (None, picture((1, 2, 3), (4, 5, 6)))
    )
    assert len(empty) == len(full)
