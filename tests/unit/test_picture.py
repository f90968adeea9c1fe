"""Encodings keep the pixels, in every layout that textures need."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safelight_server.domain.picture import encode, encode_within, picture_file, shrink
from safelight_server.domain.request import MediaType, PixelEncoding


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(
    height=st.integers(1, 40), width=st.integers(1, 40), align=st.sampled_from([4, 16, 256]), bottom_up=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_raw_rows_are_aligned_and_in_order(height, width, align, bottom_up):
    image = pixels(height, width, height * 41 + width)
    encoded = encode(image, PixelEncoding(MediaType.RAW_RGBA8, row_alignment_bytes=align, bottom_up=bottom_up))
    assert encoded.stride_bytes % align == 0
    assert encoded.stride_bytes - 4 * width < align
    rows = np.frombuffer(encoded.data, np.uint8).reshape(height, encoded.stride_bytes)
    texels = rows[:, : 4 * width].reshape(height, width, 4)
    assert (texels[..., 3] == 255).all()
    assert np.array_equal(texels[::-1, :, :3] if bottom_up else texels[..., :3], image)
    file = picture_file(encoded, bottom_up=bottom_up)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file.data))), image)


@pytest.mark.parametrize("media_type", [MediaType.JPEG, MediaType.WEBP, MediaType.PNG])
def test_files_open_as_what_they_say(media_type):
    smooth = np.full((32, 48, 3), (200, 40, 60), np.uint8)
    encoded = encode(smooth, PixelEncoding(media_type))
    image = Image.open(io.BytesIO(encoded.data))
    assert Image.MIME[image.format] == media_type
    assert image.size == (encoded.width_px, encoded.height_px) == (48, 32)
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - smooth).max() <= 6
    assert encoded.stride_bytes == 0


def test_png_is_lossless_and_quality_counts():
    image = pixels(16, 16)
    decoded = Image.open(io.BytesIO(encode(image, PixelEncoding(MediaType.PNG)).data))
    assert np.array_equal(np.asarray(decoded), image)
    low, high = (len(encode(image, PixelEncoding(MediaType.JPEG, quality=q)).data) for q in (10, 95))
    assert low < high


@given(height=st.integers(1, 99), width=st.integers(1, 99), edge=st.integers(8, 64))
@settings(max_examples=60, deadline=None)
def test_shrinking_keeps_the_aspect_and_never_enlarges(height, width, edge):
    small = shrink(pixels(height, width), edge)
    assert max(small.shape[:2]) == min(edge, max(height, width))
    if max(height, width) <= edge:
        assert small.shape == (height, width, 3)
    else:
        exact = edge * min(height, width) / max(height, width)
        assert abs(min(small.shape[:2]) - max(1.0, exact)) <= 0.5 + 1e-9  # a half may be rounded either way


@pytest.mark.parametrize("media_type", list(MediaType))
@pytest.mark.parametrize(("height", "width"), [(100, 60), (1, 300), (301, 7)])
def test_what_was_shrunk_can_be_encoded(media_type, height, width):
    small = shrink(pixels(height, width), 64)
    encoded = encode(small, PixelEncoding(media_type))
    assert (encoded.height_px, encoded.width_px) == small.shape[:2]
    if media_type not in (MediaType.RAW_RGBA8, MediaType.KTX2):
        assert Image.open(io.BytesIO(encoded.data)).size == (encoded.width_px, encoded.height_px)


def test_shrinking_averages():
    """Every pixel counts: a fine pattern becomes its mean, not one of its lines."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 200
    assert np.abs(shrink(stripes, 32).astype(int) - 100).max() <= 1


@pytest.mark.parametrize(
    "encoding",
    [
        PixelEncoding(MediaType.RAW_RGBA8, row_alignment_bytes=4),
        PixelEncoding(MediaType.RAW_RGBA8, row_alignment_bytes=4096),
        PixelEncoding(MediaType.PNG),
        PixelEncoding(MediaType.JPEG, quality=100),
    ],
    ids=lambda encoding: f"{encoding.media_type.value}-{encoding.row_alignment_bytes}",
)
def test_what_is_too_large_is_scaled_down_until_it_fits(encoding):
    noise, bound = pixels(2048, 1536), 3_500_000
    encoded = encode_within(noise, encoding, bound)
    assert len(encode(noise, encoding).data) > bound >= len(encoded.data) > 0.6 * bound
    assert encoded.width_px / encoded.height_px == pytest.approx(0.75, rel=0.01)


def test_what_fits_stays_as_it_is_and_one_pixel_is_the_least():
    noise, encoding = pixels(16, 16), PixelEncoding(MediaType.RAW_RGBA8)
    assert encode_within(noise, encoding, 1024) == encode(noise, encoding)
    assert encode_within(noise, encoding, 1).width_px == 1
