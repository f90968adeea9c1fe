"""Decodes previews and pictures with numpy and Pillow, which are imported only when they are needed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from numpy.typing import NDArray

    from safelight.events import EncodedImage

RAW = "application/x-raw-rgba8"
"""Media type of raw pixels: four bytes each, red, green, blue, alpha."""


def to_image(encoded: EncodedImage) -> PIL.Image.Image:
    """A received image as a Pillow image, its top row first."""
    pillow = _imported("PIL.Image")
    if encoded.media_type == RAW:
        size, order = (encoded.width_px, encoded.height_px), -1 if encoded.bottom_up else 1
        image: PIL.Image.Image = pillow.frombytes(
            "RGBA", size, encoded.data, "raw", "RGBA", encoded.stride_bytes, order
        )
        return image
    opened: PIL.Image.Image = pillow.open(io.BytesIO(encoded.data))
    return opened


def to_array(encoded: EncodedImage) -> NDArray[np.uint8]:
    """A received image as (height, width, 4) uint8, the top row first."""
    numpy = _imported("numpy")
    if encoded.media_type != RAW:
        decoded: NDArray[np.uint8] = numpy.asarray(to_image(encoded).convert("RGBA"))
        return decoded
    stride = encoded.stride_bytes or 4 * encoded.width_px
    rows = numpy.frombuffer(encoded.data, numpy.uint8).reshape(encoded.height_px, stride)
    pixels: NDArray[np.uint8] = rows[:, : 4 * encoded.width_px].reshape(encoded.height_px, encoded.width_px, 4)
    return pixels[::-1] if encoded.bottom_up else pixels


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: in a clone of Safelight, pip install './clients/python[images]'", name=error.name
        ) from None
