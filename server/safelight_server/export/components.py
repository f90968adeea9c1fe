"""Wraps the networks so that names and shapes of inputs and outputs are those of the server's components."""

from __future__ import annotations

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from safelight_server.export.source import ExportError


class TextEncoder(nn.Module):
    """input_ids (B, T) int64 -> last_hidden_state (B, T, D), pooled_output (B, P)."""

    outputs = ("last_hidden_state", "pooled_output")

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        result = self.model(input_ids=input_ids)
        return result.last_hidden_state, result.pooler_output


class Denoiser(nn.Module):
    """sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, T, D) -> prediction (B, C, h, w)."""

    outputs = ("prediction",)

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        prediction: Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return prediction


class Decoder(nn.Module):
    """latent (B, C, h, w), divided by the scaling factor -> image (B, 3, H, W) in [-1, 1], unclamped.

    A preview decoder may count on a scaling factor of its own: `scale` is the pipeline's by its.
    """

    outputs = ("image",)

    def __init__(self, vae: AutoencoderTiny | AutoencoderKL, scale: float = 1.0) -> None:
        super().__init__()
        self.vae = vae
        self.scale = scale

    def forward(self, latent: Tensor) -> Tensor:
        scaled = latent if self.scale == 1.0 else latent * self.scale
        image: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return image


def decoder_of(vae: nn.Module) -> Decoder:
    """The decoder of an autoencoder class that is known to keep the contract."""
    if not isinstance(vae, AutoencoderTiny | AutoencoderKL):
        raise ExportError(f"no decoder for {type(vae).__name__}; AutoencoderTiny and AutoencoderKL are known")
    return Decoder(vae)
