"""Reads the pictures that clients send: checks their files, and decodes them at the size of a generation. Pure.

The files come from anyone, so the formats are few, and the size is checked
before a pixel is decoded.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from safelight_server.domain.picture import Pixels

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp"}
"""Media types by Pillow's names; MPO is a JPEG with further views behind it, as some telephones write it."""
OFFERED = "PNG, JPEG and WebP are taken"

Image.MAX_IMAGE_PIXELS = None  # a bound of ours is checked in its place: Pillow's warns and lets twice as much pass
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
"""What Pillow raises for files that are not what they say."""


class PictureFileError(Exception):
    """The file cannot be used as a picture; the message says why."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """What is known of a picture's file. Its size is that of the upright picture."""

    media_type: str
    width_px: int
    height_px: int


def check_picture(data: bytes, max_pixels: int) -> PictureFile:
    """Decodes a whole file, to see that it can be.

    Raises:
        PictureFileError: it is no picture, too large, animated or damaged.
    """
    image = _opened(data, max_pixels)
    media_type = FORMATS[str(image.format)]
    upright = _upright(image)
    return PictureFile(media_type, upright.width, upright.height)


def has_alpha(data: bytes) -> bool:
    """Whether a file that `check_picture` has taken says what is transparent; decodes no pixel."""
    return Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")).has_transparency_data


def decode_picture(data: bytes, max_pixels: int, width_px: int, height_px: int) -> Pixels:
    """The picture, (H, W, 3) uint8, cut at its longer sides to the shape of the size and scaled; over white.

    Raises:
        PictureFileError: as `check_picture`.
    """
    image = _eight_bits(_upright(_opened(data, max_pixels)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(_fitted(image.convert("RGB"), width_px, height_px))


def decode_mask(data: bytes, max_pixels: int, width_px: int, height_px: int) -> Pixels:
    """A mask, (H, W) uint8, cut and scaled as `decode_picture`: 255 where it is white or transparent.

    Raises:
        PictureFileError: as `check_picture`.
    """
    image = _eight_bits(_upright(_opened(data, max_pixels)))
    if image.has_transparency_data:
        return np.asarray(_fitted(ImageOps.invert(image.convert("RGBA").getchannel("A")), width_px, height_px))
    return np.asarray(_fitted(image.convert("L"), width_px, height_px))


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        width, height = image.size
        frames = getattr(image, "n_frames", 1)
    except _FAULTS:
        raise PictureFileError(f"is no picture that can be read; {OFFERED}") from None
    if width * height > max_pixels:
        raise PictureFileError(f"has {width}x{height} pixels; at most {max_pixels} are taken")
    if frames > 1 and image.format != "MPO":
        raise PictureFileError(f"is animated, with {frames} frames; send one of them")
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except _FAULTS as error:
        raise PictureFileError(f"is damaged or cut off: {str(error)[:120]}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as 8 bits: Pillow's own conversion cuts off what is above 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65_535).astype(np.uint32) * 255 // 65_535).astype(np.uint8))


def _fitted(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    return ImageOps.fit(image, (width_px, height_px), Image.Resampling.LANCZOS)
