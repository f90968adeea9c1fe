"""Encodes pixels as JPEG, WebP, PNG, raw RGBA or a texture.

The encoders release the GIL, so threads run them in parallel.
"""

from __future__ import annotations

import asyncio
import io
import math
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from safelight_server.domain.ktx2 import ktx2
from safelight_server.domain.request import MediaType, PixelEncoding

Pixels = npt.NDArray[np.uint8]


def clip_centre(image: Image.Image, edge_px: int) -> Image.Image:
    """The middle of a picture as CLIP takes it: the shorter edge scaled to `edge_px`, bicubic, then a square cut out.

    Bit for bit as transformers' CLIPImageProcessor with Pillow.
    """
    shorter = min(image.size)
    size = tuple(edge_px if edge == shorter else int(edge_px * edge / shorter) for edge in image.size)
    return middle(image.resize((size[0], size[1]), Image.Resampling.BICUBIC), edge_px, edge_px)


def middle(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    """The middle of a picture, cut out."""
    left, top = (image.width - width_px) // 2, (image.height - height_px) // 2
    return image.crop((left, top, left + width_px, top + height_px))


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """An encoded picture. `stride_bytes` is the distance between rows of raw pixels; 0 for other media types."""

    media_type: MediaType
    width_px: int
    height_px: int
    stride_bytes: int
    data: bytes


class FinishedPicture:
    """A finished picture, (H, W, 3) uint8 sRGB. Each encoding of it is made once, in the threads of `pool`."""

    def __init__(self, pixels: Pixels, pool: Executor) -> None:
        self.pixels = pixels
        self._pool = pool
        self._encodings: dict[PixelEncoding, asyncio.Task[EncodedPicture]] = {}

    async def encoded(self, encoding: PixelEncoding) -> EncodedPicture:
        """The encoded picture; further calls with an equal encoding return the same one."""
        if (task := self._encodings.get(encoding)) is None:
            task = self._encodings[encoding] = asyncio.create_task(self._encode(encoding))
        return await asyncio.shield(task)

    async def _encode(self, encoding: PixelEncoding) -> EncodedPicture:
        return await asyncio.get_running_loop().run_in_executor(self._pool, encode, self.pixels, encoding)


def encode(pixels: Pixels, encoding: PixelEncoding) -> EncodedPicture:
    """Encodes pixels, (H, W, 3) uint8 sRGB."""
    height, width, _ = pixels.shape
    stride = 0
    match encoding.media_type:
        case MediaType.JPEG:
            data = simplejpeg.encode_jpeg(pixels, quality=encoding.quality, colorspace="RGB", colorsubsampling="420")
        case MediaType.WEBP:
            data = _pillow(pixels, "WEBP", quality=encoding.quality, method=0)
        case MediaType.PNG:
            data = _pillow(pixels, "PNG", compress_level=1)
        case MediaType.RAW_RGBA8:
            data, stride = _raw(pixels, encoding)
        case MediaType.KTX2:
            data = ktx2(pixels, encoding.texture_format, bottom_up=encoding.bottom_up)
    return EncodedPicture(encoding.media_type, width, height, stride, data)


def encode_within(pixels: Pixels, encoding: PixelEncoding, max_bytes: int) -> EncodedPicture:
    """Encodes pixels, (H, W, 3) uint8 sRGB, scaled down (aspect kept) until the result has at most `max_bytes`."""
    encoded = encode(pixels, encoding)
    while len(encoded.data) > max_bytes and (edge := max(encoded.width_px, encoded.height_px)) > 1:
        fits = edge * math.sqrt(max_bytes / len(encoded.data))  # the size grows roughly with the area
        encoded = encode(shrink(pixels, max(1, min(edge - 1, int(0.98 * fits)))), encoding)
    return encoded


def picture_file(picture: EncodedPicture, *, bottom_up: bool) -> EncodedPicture:
    """A picture in a file format: raw pixels (`bottom_up`: bottom row first) become a PNG, others are unchanged."""
    if picture.media_type is not MediaType.RAW_RGBA8:
        return picture
    rows = np.frombuffer(picture.data, np.uint8).reshape(picture.height_px, picture.stride_bytes)
    pixels = rows[:, : 4 * picture.width_px].reshape(picture.height_px, picture.width_px, 4)[..., :3]
    return encode(np.ascontiguousarray(pixels[::-1] if bottom_up else pixels), PixelEncoding(MediaType.PNG))


def shrink(pixels: Pixels, max_edge_px: int | None) -> Pixels:
    """Scales pixels down, keeping the aspect, until no edge is longer than `max_edge_px`. Never scales up."""
    height, width, _ = pixels.shape
    if max_edge_px is None or max(height, width) <= max_edge_px:
        return pixels
    scale = max_edge_px / max(height, width)
    return scaled(pixels, max(1, round(width * scale)), max(1, round(height * scale)))


def scaled(pixels: Pixels, width_px: int, height_px: int) -> Pixels:
    """Pixels, (H, W, 3) or (H, W), at another size; each new pixel is the mean of the old pixels that it covers."""
    return np.asarray(Image.fromarray(pixels).resize((width_px, height_px), Image.Resampling.BOX))


def _pillow(pixels: Pixels, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _raw(pixels: Pixels, encoding: PixelEncoding) -> tuple[bytes, int]:
    height, width, _ = pixels.shape
    align = encoding.row_alignment_bytes
    stride = -(-4 * width // align) * align
    rows = np.zeros((height, stride), np.uint8)
    texels = rows[:, : 4 * width].reshape(height, width, 4)
    texels[..., :3] = pixels[::-1] if encoding.bottom_up else pixels
    texels[..., 3] = 255
    return rows.tobytes(), stride
