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
from PIL import ExifTags, Image, ImageOps

from safelight_server.domain.picture import Pixels, clip_centre, middle

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp"}
"""Media types by Pillow's names. MPO is a JPEG followed by further views, as some phones write it."""
OFFERED = "send PNG, JPEG or WebP"
Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is checked instead: Pillow's bound only warns below twice its value
LONGEST_SHAPE = 16
"""How many times as long as wide an image prompt is scaled; the rest of a longer one is far outside of its middle."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation. Pillow's `exif_transpose` also writes the EXIF data anew, and
raises AttributeError where a tag has a type that it does not expect."""
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
"""What Pillow raises for damaged files."""


class PictureFileError(Exception):
    """The file cannot be used as a picture; the message says why."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """The facts of a picture's file. The size is that of the upright picture."""

    media_type: str
    width_px: int
    height_px: int


def check_picture(data: bytes, max_pixels: int) -> PictureFile:
    """Checks a file by decoding it completely.

    Raises:
        PictureFileError: the file is no picture, too large, animated or damaged.
    """
    image = _opened(data, max_pixels)
    media_type = FORMATS[str(image.format)]
    upright = _upright(image)
    return PictureFile(media_type, upright.width, upright.height)


def has_alpha(data: bytes) -> bool:
    """Whether a file that `check_picture` has accepted has transparency; decodes no pixel."""
    return Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")).has_transparency_data


def decode_picture(data: bytes, max_pixels: int, width_px: int, height_px: int) -> Pixels:
    """The picture, (H, W, 3) uint8, over white, cropped to the aspect ratio of the size and scaled.

    Raises:
        PictureFileError: as `check_picture`.
    """
    image = _over_white(_upright(_opened(data, max_pixels)))
    return np.asarray(_fitted(image, width_px, height_px))


def decode_mask(data: bytes, max_pixels: int, width_px: int, height_px: int) -> Pixels:
    """A mask, (H, W) uint8, cut and scaled as `decode_picture`: 255 where it is white or transparent.

    Raises:
        PictureFileError: as `check_picture`.
    """
    image = _eight_bits(_upright(_opened(data, max_pixels)))
    if image.has_transparency_data:
        return np.asarray(_fitted(ImageOps.invert(image.convert("RGBA").getchannel("A")), width_px, height_px))
    return np.asarray(_fitted(image.convert("L"), width_px, height_px))


def decode_image_prompt(data: bytes, max_pixels: int, edge_px: int) -> Pixels:
    """The centre of a picture as CLIP's image encoder takes it, (edge_px, edge_px, 3) uint8, over white.

    It has the pixels of transformers' CLIPImageProcessor: the shortest edge is scaled to `edge_px`, bicubic, and the
    middle is cut out. Of a picture that is longer than `LONGEST_SHAPE` to 1 only the middle so long is scaled, so
    that a long thin one takes no more memory than another.

    Raises:
        PictureFileError: as `check_picture`.
    """
    image = _over_white(_upright(_opened(data, max_pixels)))
    longest = LONGEST_SHAPE * min(image.size)
    return np.asarray(clip_centre(middle(image, *(min(edge, longest) for edge in image.size)), edge_px))


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        width, height = image.size
        frames = getattr(image, "n_frames", 1)
    except _FAULTS:
        raise PictureFileError(f"cannot be read as a picture; {OFFERED}") from None
    if width * height > max_pixels:
        raise PictureFileError(f"has {width}x{height} pixels; it must have at most {max_pixels}")
    if frames > 1 and image.format != "MPO":
        raise PictureFileError(f"is animated, with {frames} frames; send one of them")
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.load()
        if image.mode in ("P", "PA") and image.palette is None:  # Pillow fails later, when it looks for a colour
            raise ValueError("it has no palette")
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return image if turn is None else image.transpose(turn)
    except _FAULTS as error:
        raise PictureFileError(f"is damaged or cut off: {str(error)[:120]}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts 16-bit grey to 8 bits, and the value that is transparent. Pillow itself clips values above 255."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 65_535)
    grey = Image.fromarray((values.astype(np.uint32) * 255 // 65_535).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _over_white(image: Image.Image) -> Image.Image:
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _fitted(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    return ImageOps.fit(image, (width_px, height_px), Image.Resampling.LANCZOS)
