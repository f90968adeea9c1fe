"""Conversion between Blender's image datablocks and pixels. Use it from the main thread only."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import bpy
    from numpy.typing import NDArray

PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""PNG's colour type by the number of channels; see "IHDR" in the PNG specification."""


def show(image: bpy.types.Image, pixels: NDArray[np.float32], width: int, height: int) -> None:
    """Copies pixels into an image and scales it to the given size.

    Args:
        pixels: (h, w, 4) float32 from 0 to 1 in the image's own colour space, the lowest row first.
        width, height: size of the image afterwards.
    """
    resize(image, pixels.shape[1], pixels.shape[0])
    image.pixels.foreach_set(pixels.ravel())
    resize(image, width, height)
    image.update()


def resize(image: bpy.types.Image, width: int, height: int) -> None:
    """Scales an image with Blender's linear filter."""
    if tuple(image.size) != (width, height):
        image.scale(width, height)


def to_png(image: bpy.types.Image) -> bytes:
    """The present content of an image as a PNG file, including unsaved paint.

    Raises:
        ValueError: it has no pixels, or it is a float image, whose colour space a PNG cannot express.
    """
    width, height = image.size
    if image.is_float:
        raise ValueError(f"init_image: {image.name} is a float image: save it as PNG or JPEG and open that")
    if not width or not height:
        raise ValueError(f"init_image: {image.name} has no pixels")
    values = np.empty(len(image.pixels), np.float32)
    image.pixels.foreach_get(values)
    rows = np.rint(values * 255).astype(np.uint8).reshape(height, -1)[::-1]
    return png(rows, width)


def png(rows: NDArray[np.uint8], width: int) -> bytes:
    """Encodes (height, width * channels) uint8, the top row first, as PNG."""
    height, num_bytes = rows.shape
    header = struct.pack(">IIBBBBB", width, height, 8, PNG_COLOUR_TYPES[num_bytes // width], 0, 0, 0)
    unfiltered = np.pad(rows, ((0, 0), (1, 0)))  # each row begins with the number of its filter: 0, none
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
