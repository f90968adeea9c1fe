"""Textures: the header of the file and its decoded blocks. tests/tools/test_ktx.py has another reader of KTX 2.0."""

from __future__ import annotations

import io
import struct

import etcpak
import numpy as np
import pytest
from PIL import Image
from safelight_server.domain.ktx2 import BLOCK_BYTES, HEADER_BYTES, TextureFormat, ktx2
from safelight_server.domain.picture import encode
from safelight_server.domain.request import MediaType, PixelEncoding

DXGI = {TextureFormat.BC1: 71, TextureFormat.BC7: 98}  # DXGI_FORMAT_BC1_UNORM, DXGI_FORMAT_BC7_UNORM


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture, (height, width, 3), whose top is dark."""
    y, x = np.mgrid[0:height, 0:width] * min(3.0, 255 / max(height, width))
    return np.stack((y, x, (x + y) / 2), -1).astype(np.uint8)


def level(file: bytes) -> bytes:
    """The bytes of the only level."""
    at, size, uncompressed = struct.unpack_from("<3Q", file, HEADER_BYTES)
    assert size == uncompressed
    assert at + size == len(file)
    return file[at:]


def texels(file: bytes, texture_format: TextureFormat) -> np.ndarray:
    """Decodes the blocks as a GPU would, to (height, width, 3), by Pillow's reader of DDS files."""
    width, height = (-(-one // 4) * 4 for one in struct.unpack_from("<2I", file, 20))
    pixel_format = struct.pack("<2I4s5I", 32, 4, b"DX10", 0, 0, 0, 0, 0)
    header = (
        struct.pack("<7I44x", 124, 0x1007, height, width, 0, 0, 0)
        + pixel_format
        + struct.pack("<5I", 0x1000, 0, 0, 0, 0)
    )
    dds = b"DDS " + header + struct.pack("<5I", DXGI[texture_format], 3, 0, 1, 0) + level(file)
    return np.asarray(Image.open(io.BytesIO(dds)).convert("RGB"))


@pytest.mark.parametrize("texture_format", TextureFormat)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (64, 64), (30, 66), (1, 1), (2100, 8)])
def test_blocks_show_the_picture_and_its_edges_repeated(height, width, texture_format):
    pixels = picture(height, width)
    file = ktx2(pixels, texture_format)
    assert len(level(file)) == -(-height // 4) * -(-width // 4) * BLOCK_BYTES[texture_format]
    shown = texels(file, texture_format)
    missing = ((0, -height % 4), (0, -width % 4), (0, 0))
    error = shown.astype(float) - np.pad(pixels, missing, mode="edge")
    assert np.sqrt((error**2).mean()) < (8 if texture_format is TextureFormat.BC1 else 3)


def test_slices_make_the_same_blocks_as_the_whole():
    pixels = picture(512, 640)
    rgba = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]).tobytes()
    assert level(ktx2(pixels, TextureFormat.BC1)) == etcpak.compress_bc1(rgba, 640, 512)


@pytest.mark.parametrize("bottom_up", [False, True])
def test_the_order_of_rows_is_in_the_file(bottom_up):
    pixels = picture(32, 32)
    encoding = PixelEncoding(MediaType.KTX2, bottom_up=bottom_up)
    encoded = encode(pixels, encoding)
    assert (encoded.width_px, encoded.height_px, encoded.stride_bytes) == (32, 32, 0)
    assert (b"KTXorientation\0ru\0" if bottom_up else b"KTXorientation\0rd\0") in encoded.data
    shown = texels(encoded.data, TextureFormat.BC1).astype(float)
    expected = pixels[::-1] if bottom_up else pixels
    assert np.abs(shown - expected).mean() < 4 < np.abs(shown - expected[::-1]).mean()
