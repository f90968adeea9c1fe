"""Converts latents to decoder inputs and decoder outputs to pixels, for the family "stable-diffusion". Pure numpy.

Decoders take latent / scaling_factor + shift_factor and return images in [-1, 1].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.request import Spec
from safelight_server.domain.tensors import FloatArray
from safelight_server.sampler import SamplerTable, compile_table


class NotFiniteError(Exception):
    """A decoder returned infinite or NaN values: its arithmetic overflowed, as float16 can."""


def sampler_table(pipeline: Pipeline, spec: Spec) -> SamplerTable:
    """The compiled sampler for a valid request."""
    steps, prediction_type = spec.num_inference_steps, pipeline.manifest.prediction_type
    _, height, width = pipeline.latent_shape(spec.width_px, spec.height_px)
    return compile_table(spec.sampler, pipeline.schedule.at(height, width), prediction_type, steps, spec.first_step)


def decoder_latent(pipeline: Pipeline, latent: FloatArray) -> FloatArray:
    """Scales and shifts latents, (B, C, h, w), to the inputs of the decoders."""
    at = pipeline.manifest.latent
    return latent / np.float32(at.scaling_factor) + np.float32(at.shift_factor)


def denoiser_latent(pipeline: Pipeline, latent: FloatArray) -> FloatArray:
    """Shifts and scales latents of the encoder, (C, h, w), to the denoiser's latents."""
    at = pipeline.manifest.latent
    return (latent - np.float32(at.shift_factor)) * np.float32(at.scaling_factor)


def encoder_image(pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8] | None = None) -> FloatArray:
    """Converts RGB bytes (H, W, 3) to the encoder's input, (3, H, W) in [-1, 1], like diffusers' image processor.

    Args:
        mask: (H, W); what it develops anew is left out: 0, a grey that no byte stands for. None: nothing is.
    """
    shares = pixels.astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    image = np.float32(2) * shares - np.float32(1)
    return np.ascontiguousarray(image if mask is None else image * ~is_anew(mask))


def is_anew(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Where an inpainting denoiser develops anew: it takes no grey, and diffusers draws the line at one half."""
    return mask >= 128


def sampled_mask(mask: npt.NDArray[np.uint8], size: tuple[int, ...]) -> FloatArray:
    """A mask (H, W) as an inpainting denoiser takes it, (1, h, w): 0 or 1, by the first pixel of each block.

    Not their mean: the network was trained on masks that were shrunk so, as diffusers does.
    """
    height, width = size
    first = mask[:: mask.shape[0] // height, :: mask.shape[1] // width]
    return is_anew(first).astype(np.float32)[None]


def shrunk_mask(mask: npt.NDArray[np.uint8], size: tuple[int, ...]) -> FloatArray:
    """A mask (H, W) at the latent's `size` (h, w): each value is the mean of its pixels, in [0, 1]."""
    height, width = size
    blocks = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    shares: FloatArray = blocks.astype(np.float32).mean(axis=(1, 3)) / np.float32(255)
    return shares


def to_pixels(image: FloatArray) -> npt.NDArray[np.uint8]:
    """Converts a decoded image to RGB bytes, clamped and rounded as diffusers' image processor does.

    Args:
        image: (3, H, W), nominally in [-1, 1].

    Returns:
        (H, W, 3) uint8.

    Raises:
        NotFiniteError: a value is infinite or NaN.
    """
    if not np.isfinite(image).all():
        raise NotFiniteError("the decoded image is not finite")
    scaled = np.clip(image / 2 + np.float32(0.5), 0.0, 1.0).transpose(1, 2, 0)
    return np.ascontiguousarray(np.round(scaled * 255.0).astype(np.uint8))


def linear_image(pipeline: Pipeline, latent: FloatArray) -> FloatArray:
    """Preview by a linear map of each latent pixel: (C, h, w) -> (3, h * k, w * k), roughly in [-1, 1]."""
    channels, height, width = latent.shape
    block = pipeline.manifest.linear_preview.block
    pixels = latent.reshape(channels, -1).T @ pipeline.linear_weights + pipeline.linear_bias
    grid = pixels.reshape(height, width, 3, block, block).transpose(2, 0, 3, 1, 4)
    return np.ascontiguousarray(grid.reshape(3, height * block, width * block))
