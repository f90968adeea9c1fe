"""Block-compressed textures in KTX 2.0 files, which graphics APIs upload as they are.

etcpak holds the GIL, so it is called for a few rows of blocks at a time: other threads,
such as the event loop, then wait about a millisecond at most.

One level, no supercompression, sRGB. Source: KTX File Format Specification 2.0 and
Khronos Data Format Specification 1.3 (registry.khronos.org). The blocks are made by
etcpak. If an edge is no multiple of four, its last pixels are repeated up to the next
multiple; the header has the real size.
"""

from __future__ import annotations

import enum
import struct

import etcpak
import numpy as np
import numpy.typing as npt


class TextureFormat(enum.Enum):
    """Block formats. BC1: 4 bits a pixel, no alpha. BC7: 8 bits a pixel, nearly without loss, and slow to make."""

    BC1 = "bc1"
    BC7 = "bc7"


IDENTIFIER = b"\xabKTX 20\xbb\r\n\x1a\n"
BLOCK_PX = 4
SLICE_BLOCKS = {TextureFormat.BC1: 8192, TextureFormat.BC7: 256}
"""Blocks of one call, which takes about a millisecond; a call makes at least one row of blocks."""
VK_FORMAT = {TextureFormat.BC1: 132, TextureFormat.BC7: 146}  # VK_FORMAT_BC1_RGB_SRGB_BLOCK, VK_FORMAT_BC7_SRGB_BLOCK
BLOCK_BYTES = {TextureFormat.BC1: 8, TextureFormat.BC7: 16}
COLOR_MODEL = {TextureFormat.BC1: 128, TextureFormat.BC7: 134}  # KHR_DF_MODEL_BC1A, KHR_DF_MODEL_BC7
BT709, SRGB = 1, 2  # KHR_DF_PRIMARIES_BT709, KHR_DF_TRANSFER_SRGB
HEADER_BYTES, LEVEL_BYTES = 80, 24


def ktx2(pixels: npt.NDArray[np.uint8], texture_format: TextureFormat, *, bottom_up: bool = False) -> bytes:
    """A KTX 2.0 file of pixels, (H, W, 3) uint8 sRGB. `bottom_up`: the first row of blocks is the bottom one."""
    height, width, _ = pixels.shape
    data = _blocks(pixels[::-1] if bottom_up else pixels, texture_format)
    descriptor = _descriptor(texture_format)
    facts = _key_values({"KTXorientation": "ru" if bottom_up else "rd", "KTXwriter": "Safelight"})
    descriptor_at = HEADER_BYTES + LEVEL_BYTES
    facts_at = descriptor_at + len(descriptor)
    block_bytes = BLOCK_BYTES[texture_format]  # a multiple of 4, to which the level is aligned
    data_at = -(-(facts_at + len(facts)) // block_bytes) * block_bytes
    header = IDENTIFIER + struct.pack(
        "<9I4I2Q",
        *(VK_FORMAT[texture_format], 1, width, height, 0, 0, 1, 1, 0),
        *(descriptor_at, len(descriptor), facts_at, len(facts)),
        *(0, 0),
    )
    level = struct.pack("<3Q", data_at, len(data), len(data))
    return (header + level + descriptor + facts).ljust(data_at, b"\0") + data


def _blocks(pixels: npt.NDArray[np.uint8], texture_format: TextureFormat) -> bytes:
    height, width, _ = pixels.shape
    missing = (-height % BLOCK_PX, -width % BLOCK_PX)
    texels = np.empty((height + missing[0], width + missing[1], 4), np.uint8)
    texels[..., :3] = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    texels[..., 3] = 255
    rows = max(1, SLICE_BLOCKS[texture_format] * BLOCK_PX // texels.shape[1]) * BLOCK_PX
    slices = (texels[at : at + rows] for at in range(0, len(texels), rows))
    return b"".join(_compressed(rows_of_blocks, texture_format) for rows_of_blocks in slices)


def _compressed(texels: npt.NDArray[np.uint8], texture_format: TextureFormat) -> bytes:
    height, width, _ = texels.shape
    match texture_format:
        case TextureFormat.BC1:
            return bytes(etcpak.compress_bc1(texels.tobytes(), width, height))
        case TextureFormat.BC7:
            return bytes(etcpak.compress_bc7(texels.tobytes(), width, height, None))


def _descriptor(texture_format: TextureFormat) -> bytes:
    """The basic data format descriptor, of one sample: the whole block."""
    block_bytes = BLOCK_BYTES[texture_format]
    sample = struct.pack("<HBB4B2I", 0, block_bytes * 8 - 1, 0, 0, 0, 0, 0, 0, 0xFFFFFFFF)
    size = 24 + len(sample)
    block = struct.pack("<IHH4B", 0, 2, size, COLOR_MODEL[texture_format], BT709, SRGB, 0)
    block += bytes([BLOCK_PX - 1, BLOCK_PX - 1, 0, 0]) + bytes([block_bytes]).ljust(8, b"\0")
    return struct.pack("<I", 4 + size) + block + sample


def _key_values(values: dict[str, str]) -> bytes:
    """Key/value data; the keys are sorted, as the specification requires."""
    made = b""
    for key, value in sorted(values.items()):
        entry = key.encode() + b"\0" + value.encode() + b"\0"
        made += (struct.pack("<I", len(entry)) + entry).ljust(-(-(4 + len(entry)) // 4) * 4, b"\0")
    return made
