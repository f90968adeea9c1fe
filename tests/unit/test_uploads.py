"""Uploaded pictures: unusable files are refused with the reason, and others are decoded to the right pixels."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from safelight_server.domain.uploads import (
    PictureFileError,
    check_picture,
    decode_image_prompt,
    decode_mask,
    decode_picture,
)

WHOLE = 1 << 20
RED, BLUE, GREEN, WHITE = (200, 30, 20), (10, 20, 210), (20, 180, 40), (255, 255, 255)


def quarters(mode: str = "RGB") -> Image.Image:
    """16 x 16 pixels: red and blue above green and white."""
    image = Image.new("RGB", (16, 16))
    for place, colour in enumerate((RED, BLUE, GREEN, WHITE)):
        image.paste(colour, (8 * (place % 2), 8 * (place // 2), 8 * (place % 2) + 8, 8 * (place // 2) + 8))
    return image.convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these chunks, with the sums that their readers check."""
    pieces = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def bomb(width: int, height: int) -> bytes:
    """A small PNG file whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_of((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))


def without_palette() -> bytes:
    """A PNG file of 4 x 4 pixels that are places in a palette which it lacks."""
    header = struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)
    return png_of((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 20)), (b"IEND", b""))


def with_sums(data: bytes) -> bytes:
    """A damaged PNG file with the sums of its chunks made anew, so that their readers look at what is in them."""
    made, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack(">I", data[at : at + 4])[0]
        if end + 4 > len(data):
            break
        made += data[at:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(made) + data[at:]


def animation(kind: str) -> bytes:
    return file_of(quarters(), kind, save_all=True, append_images=[Image.new("RGB", (16, 16))])


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read as a picture; send PNG, JPEG or WebP"),
        (b"not a picture", "cannot be read as a picture"),
        (file_of(quarters(), "GIF"), "cannot be read as a picture"),
        (file_of(quarters(), "TIFF"), "cannot be read as a picture"),
        (file_of(quarters(), "BMP"), "cannot be read as a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as a picture"),
        (file_of(NOISE)[:3000], "is damaged or cut off"),
        (file_of(NOISE, "JPEG")[:1500], "is damaged or cut off"),
        (file_of(NOISE, "WEBP")[:1500], "is damaged or cut off|cannot be read as a picture"),
        (without_palette(), "is damaged or cut off: it has no palette"),
        (bomb(10_000, 10_000), "has 10000x10000 pixels; it must have at most 1048576"),
        (bomb(1, (1 << 20) + 1), "has 1x1048577 pixels"),
        (bomb(2**31 - 1, 2**31 - 1), "cannot be read as a picture|it must have at most"),
        (animation("PNG"), "is animated, with 2 frames; send one of them"),
        (animation("WEBP"), "is animated, with 2 frames; send one of them"),
    ],
)
def test_what_cannot_be_used_says_why(data, why):
    for read in (lambda: check_picture(data, WHOLE), lambda: decode_picture(data, WHOLE, 8, 8)):
        with pytest.raises(PictureFileError, match=why):
            read()


@given(data=st.data())
def test_a_damaged_file_is_a_picture_or_an_error_of_ours(data):
    kind, mode = data.draw(
        st.sampled_from([("PNG", "RGB"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("PNG", "P"), ("PNG", "LA")])
    )
    file = bytearray(file_of(quarters(mode), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    damaged = with_sums(bytes(file)) if kind == "PNG" and data.draw(st.booleans()) else bytes(file)
    try:
        check_picture(damaged, WHOLE)
    except PictureFileError:
        return
    try:  # what an upload was accepted for is decoded later
        pixels = decode_picture(damaged, WHOLE, 16, 16)
    except PictureFileError:
        return
    assert pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("tag", [ExifTags.Base.Software, ExifTags.Base.Artist, ExifTags.IFD.Exif])
def test_exif_data_with_an_odd_tag_does_not_matter(tag):
    """Pillow cannot write such data anew: text as a fraction, as some programs leave it."""
    for kind in range(1, 14):
        entries = struct.pack(">HHIHHHHIII", ExifTags.Base.Orientation, 3, 1, 6, 0, tag, kind, 1, 38, 0)
        exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + struct.pack(">II", 1, 2)
        with io.BytesIO() as file:
            Image.new("RGB", (4, 2)).save(file, "JPEG", exif=exif)
            facts = check_picture(file.getvalue(), WHOLE)
        assert (facts.width_px, facts.height_px) == (2, 4)


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_pillow_turns_it(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    with io.BytesIO() as file:
        Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)).save(file, "PNG", exif=exif)
        turned = ImageOps.exif_transpose(Image.open(file))
        assert np.array_equal(decode_picture(file.getvalue(), WHOLE, 8, 8), np.asarray(turned))


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The colours of the four quarters."""
    at = pixels.shape[0] // 4
    return [tuple(int(value) for value in pixels[row, column]) for row in (at, -at) for column in (at, -at)]


def near(pixels: np.ndarray, *colours: tuple[int, ...], by: int = 2) -> None:
    for found, wanted in zip(corners(pixels), colours, strict=True):
        assert np.abs(np.array(found) - np.array(wanted)).max() <= by, (found, wanted)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_picture_of_the_right_size_keeps_every_pixel(kind):
    pixels = decode_picture(file_of(NOISE, kind, lossless=True), WHOLE, 64, 64)
    assert np.array_equal(pixels, np.asarray(NOISE))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_was_held(orientation):
    turns = {
        1: None,
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # the EXIF orientation that undoes each of Image.transpose's methods
    stored = quarters() if turns[orientation] is None else quarters().transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(stored, "JPEG", quality=100, subsampling=0, exif=exif)
    near(decode_picture(data, WHOLE, 16, 16), RED, BLUE, GREEN, WHITE, by=6)
    tall = file_of(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    facts = check_picture(tall, WHOLE)
    assert (facts.width_px, facts.height_px) == ((20, 10) if orientation < 5 else (10, 20))


def test_grey_of_16_bits_is_scaled_and_not_cut_off():
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    pixels = decode_picture(file_of(Image.fromarray(ramp)), WHOLE, 16, 16)
    assert np.abs(pixels[..., 0].astype(int) - ramp / 257).max() <= 1


@pytest.mark.parametrize("clear", [0, 257 * 40, 65_535])
def test_grey_of_16_bits_may_have_a_value_that_is_transparent(clear):
    """A value beside it that becomes the same grey of 8 bits is opaque."""
    values = np.full((16, 16), 257 * 90, np.uint16)
    values[:8] = clear
    values[:, :8] = clear + (1 if clear < 65_535 else -1)
    data = file_of(Image.fromarray(values), transparency=clear)
    assert Image.open(io.BytesIO(data)).mode.startswith("I"), "Pillow has read it as grey of 16 bits"
    wanted = np.zeros((16, 16), np.uint8)
    wanted[:8, 8:] = 255
    assert np.array_equal(decode_mask(data, WHOLE, 16, 16), wanted)
    assert (decode_picture(data, WHOLE, 16, 16)[:8, 8:] == 255).all()
    assert (decode_picture(data, WHOLE, 16, 16)[8:, 8:] == 90).all()


def test_cmyk_becomes_colours():
    data = file_of(quarters("CMYK"), "JPEG", quality=100, subsampling=0)
    near(decode_picture(data, WHOLE, 16, 16), RED, BLUE, GREEN, WHITE, by=8)


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "RGBA", "I;16"])
def test_every_mode_of_a_png_is_taken(mode):
    assert decode_picture(file_of(Image.new(mode, (9, 9))), WHOLE, 8, 8).shape == (8, 8, 3)


def test_transparent_parts_count_as_white():
    image = quarters("RGBA")
    alpha = Image.new("L", (16, 16), 255)
    alpha.paste(0, (0, 0, 8, 8))
    alpha.paste(128, (8, 0, 16, 8))
    image.putalpha(alpha)
    half = tuple(round((255 - 128) / 255 * 255 + 128 / 255 * value) for value in BLUE)
    near(decode_picture(file_of(image), WHOLE, 16, 16), WHITE, half, GREEN, WHITE)
    palette = quarters().quantize(8)
    near(
        decode_picture(file_of(palette, transparency=palette.getpixel((1, 1))), WHOLE, 16, 16),
        WHITE,
        BLUE,
        GREEN,
        WHITE,
    )


def test_another_shape_is_cut_in_the_middle_and_scaled():
    wide = Image.new("RGB", (64, 16), RED)
    wide.paste(quarters(), (24, 0))
    near(decode_picture(file_of(wide), WHOLE, 32, 32), RED, BLUE, GREEN, WHITE, by=12)
    assert decode_picture(file_of(wide), WHOLE, 8, 24).shape == (24, 8, 3)


def test_a_mask_is_white_or_transparent_where_it_is_developed_anew():
    grey = Image.new("L", (16, 16), 0)
    grey.paste(255, (0, 0, 8, 16))
    grey.paste(102, (0, 0, 8, 8))
    for image in (grey, grey.convert("RGB")):
        assert decode_mask(file_of(image), WHOLE, 16, 16)[[4, 12, 4], [4, 4, 12]].tolist() == [102, 255, 0]
    image = Image.new("RGBA", (16, 16), "white")
    image.putalpha(grey.point(lambda value: 255 - value))
    assert np.array_equal(decode_mask(file_of(image), WHOLE, 16, 16), np.asarray(grey))


def clip_pixels(image: Image.Image, edge_px: int) -> np.ndarray:
    """What transformers' CLIPImageProcessor makes of a picture, before it normalizes."""
    shortest = min(image.size)
    size = [edge_px if edge == shortest else int(edge_px * edge / shortest) for edge in image.size]
    left, top = ((edge - edge_px) // 2 for edge in size)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + edge_px, top + edge_px)))


@pytest.mark.parametrize(
    "size", [(64, 64), (16, 16), (100, 41), (41, 100), (17, 90), (33, 32), (224, 17), (9, 60), (9, 10)]
)
def test_an_image_prompt_is_the_middle_that_clip_sees(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), np.uint8))
    found = decode_image_prompt(file_of(image), WHOLE, 16)
    assert found.shape == (16, 16, 3)
    assert np.array_equal(found, clip_pixels(image, 16))


def test_a_long_thin_image_prompt_takes_no_memory_of_its_scaled_length():
    """Scaled whole it would have 64 x 16,777,216 pixels."""
    image = Image.new("RGB", (1 << 18, 1), RED)
    image.paste(BLUE, (0, 0, 1 << 16, 1))
    assert (decode_image_prompt(file_of(image), WHOLE, 64) == RED).all()


def test_transparent_parts_of_an_image_prompt_are_white():
    clear = Image.new("RGBA", (16, 16), (*RED, 0))
    assert (decode_image_prompt(file_of(clear), WHOLE, 8) == WHITE).all()
    with pytest.raises(PictureFileError, match="cannot be read as a picture"):
        decode_image_prompt(b"x", WHOLE, 8)
