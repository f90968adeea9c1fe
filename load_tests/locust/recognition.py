"""Finds the preview from which a picture can be recognised. docs/load-testing.md explains the bound."""

from __future__ import annotations

import io
from collections.abc import Iterable

import PIL.Image
from PIL import ImageChops, ImageStat

EDGE_PX = 32
"""Preview and picture are scaled to squares of this edge, so that size and fine detail do not count."""
MAX_DISTANCE = 0.05


def thumbnail(data: bytes) -> PIL.Image.Image:
    """Decodes an encoded image and scales it to EDGE_PX x EDGE_PX, RGB; each pixel is the mean of its area."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").resize((EDGE_PX, EDGE_PX), PIL.Image.Resampling.BOX)


def distance(one: PIL.Image.Image, other: PIL.Image.Image) -> float:
    """Mean absolute difference of two thumbnails over pixels and channels: 0 for equal ones, 1 for black and white."""
    means = ImageStat.Stat(ImageChops.difference(one, other)).mean
    return sum(means) / len(means) / 255


def first_recognisable(previews: Iterable[tuple[float, bytes]], picture: bytes) -> float | None:
    """When the first preview came whose distance to the picture is at most MAX_DISTANCE; None if there is none.

    Args:
        previews: when each came, in any unit, and its encoded pixels; in the order in which they came.
        picture: the final picture, encoded.
    """
    final = thumbnail(picture)
    return next((at for at, data in previews if distance(thumbnail(data), final) <= MAX_DISTANCE), None)
