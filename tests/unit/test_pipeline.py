"""The arithmetic around the denoiser: scaling, rounding, and the linear preview's layout."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from safelight_server.catalog.pixels import decoder_latent, linear_image, sampler_table, to_pixels
from safelight_server.sampler import SamplerSpec

from tests.support.pipelines import small_pipeline
from tests.support.streams import SPEC


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


def test_a_larger_picture_has_a_table_of_its_own_where_the_shift_goes_by_size(tmp_path):
    flow = {"name": "flow_match_euler", "spacing": "trailing"}
    pipeline = small_pipeline(
        tmp_path,
        prediction_type="flow",
        noise_schedule={"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 24},
        samplers=[{"name": "flow_match_euler", "spacings": ["trailing"], "sigma_schedules": ["default"]}],
        defaults={"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": flow},
    )
    specs = [
        replace(SPEC, sampler=SamplerSpec(**flow), num_inference_steps=4, width_px=width, height_px=height)
        for width, height in ((64, 64), (64, 96))
    ]
    square, tall = (sampler_table(pipeline, spec).timesteps for spec in specs)
    shifts = [math.exp(0.5 + 0.65 * (tokens - 8) / 16) for tokens in (16, 24)]
    for timesteps, shift in ((square, shifts[0]), (tall, shifts[1])):
        assert timesteps[2] == pytest.approx(1000 * shift * 0.5 / (1 + (shift - 1) * 0.5))
