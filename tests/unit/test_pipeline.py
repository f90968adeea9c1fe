"""Around the denoiser: scaling, rounding, and the linear preview's layout."""

from __future__ import annotations

import numpy as np
from safelight_server.catalog.pixels import decoder_latent, linear_image, to_pixels

from tests.support.pipelines import small_pipeline


def test_pixels_are_clamped_and_rounded_to_the_nearest():
    values = np.array([-3.0, -1.0, 0.0, 1.0, 3.0, 2 * 10.6 / 255 - 1], np.float32)
    image = np.stack([values, values, -values])[:, None, :]
    pixels = to_pixels(image)
    assert pixels.shape == (1, 6, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, :, 0].tolist() == [0, 0, 128, 255, 255, 11]
    assert pixels[0, :, 2].tolist() == [255, 255, 128, 0, 0, 244]


def test_decoders_are_given_latents_scaled_then_shifted(tmp_path):
    latent = {"channels": 4, "height": 8, "width": 8, "scaling_factor": 4.0, "shift_factor": 0.5}
    scaled = decoder_latent(small_pipeline(tmp_path, latent=latent), np.full((1, 4, 8, 8), 2, np.float32))
    assert scaled.dtype == np.float32
    assert np.all(scaled == 1.0)


def test_blocks_of_the_linear_preview_lie_in_rows_and_columns(tmp_path):
    weights = [[float(column == 12 * (channel > 0)) for column in range(12)] for channel in range(4)]
    bias = [float(column) for column in range(12)]
    pipeline = small_pipeline(tmp_path, linear_preview={"block": 2, "weights": weights, "bias": bias})
    latent = np.zeros((4, 2, 3), np.float32)
    latent[0, 1, 2] = 100
    image = linear_image(pipeline, latent)
    assert image.shape == (3, 4, 6)
    assert image[0, :2, :2].tolist() == [[0, 1], [2, 3]]
    assert image[2, :2, :2].tolist() == [[8, 9], [10, 11]]
    assert image[0, 2:, 4:].tolist() == [[100, 1], [2, 3]]


def test_size_ids_are_height_and_width_of_the_picture(tmp_path):
    pipeline = small_pipeline(tmp_path)
    assert pipeline.size_ids(pipeline.latent_shape(64, 96)).tolist() == [96, 64, 0, 0, 96, 64]
