"""The networks of a diffusion pipeline, with the shapes of their inputs and outputs."""

from __future__ import annotations

import enum


class Component(enum.StrEnum):
    """A network of a pipeline, by its inputs and outputs.

    text_encoder:     input_ids (B, T) int64 -> last_hidden_state (B, T, D), pooled_output (B, P)
    denoiser:         sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, T, D) -> prediction (B, C, h, w)
    decoder:          latent (B, C, h, w), divided by the scaling factor -> image (B, 3, H, W) in [-1, 1], unclamped
    preview_decoder:  as the decoder, smaller and cheaper; its image may be smaller too
    encoder:          image (B, 3, H, W) in [-1, 1] -> mean (B, C, h, w), and std (B, C, h, w) where it encodes to a
                      distribution; on the decoder's scale
    image_encoder:    image (B, 3, S, S) in [-1, 1] -> tokens (B, T, D) and negative_tokens (B, T, D), what the denoiser
                      is given of an image prompt in the rows with and without the prompt
    """

    TEXT_ENCODER = "text_encoder"
    DENOISER = "denoiser"
    DECODER = "decoder"
    PREVIEW_DECODER = "preview_decoder"
    ENCODER = "encoder"
    IMAGE_ENCODER = "image_encoder"


OPTIONAL = frozenset({Component.PREVIEW_DECODER, Component.ENCODER, Component.IMAGE_ENCODER})
"""Components that a pipeline may lack. Without them it has no cheap decoded previews, cannot start from pictures, or
takes no image prompts."""
