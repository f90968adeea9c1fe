"""Wraps the networks so that names and shapes of inputs and outputs are those of the server's components."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

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


class TextEncoders(nn.Module):
    """Both text encoders of SDXL: input_ids (B, 2 T) int64 -> last_hidden_state (B, T, D1 + D2), pooled_output (B, P).

    The ids are those of the first tokenizer and behind them those of the second. The hidden states are those before
    the last layer, side by side; the pooled output is the second encoder's projection (Podell et al. 2023, section
    2.1).

    Args:
        empty_ids: (2 T,), the ids of an empty prompt if zeros replace its embedding, as in diffusers' pipeline without
            a negative prompt; None: it has an embedding.
    """

    outputs = ("last_hidden_state", "pooled_output")

    def __init__(
        self, first: CLIPTextModel, second: CLIPTextModelWithProjection, empty_ids: Tensor | None = None
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("empty_ids", empty_ids)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        first_ids, second_ids = input_ids.chunk(2, dim=1)
        one = self.first(input_ids=first_ids, output_hidden_states=True)
        two = self.second(input_ids=second_ids, output_hidden_states=True)
        hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        if self.empty_ids is None:
            return hidden, two.text_embeds
        there = (input_ids != self.empty_ids).any(1).float()[:, None]
        return hidden * there[..., None], two.text_embeds * there


class DenoiserXL(nn.Module):
    """SDXL's: beside `Denoiser`'s inputs text_embeds (B, P) and time_ids (B, 6)."""

    outputs = ("prediction",)

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        prediction: Tensor = self.model(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction


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


class Encoder(nn.Module):
    """image (B, 3, H, W) in [-1, 1] -> mean (B, C, h, w), and std (B, C, h, w) where `vae` encodes to a distribution.

    The latents are those of the autoencoder: the pipeline's scaling factor is not in them.
    """

    def __init__(self, vae: AutoencoderTiny | AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.outputs = ("mean", "std") if isinstance(vae, AutoencoderKL) else ("mean",)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        encoded = self.vae.encode(image, return_dict=False)[0]
        if isinstance(encoded, Tensor):
            return encoded
        return encoded.mean, encoded.std


class PatchEncoder(nn.Module):
    """A linear encoder of patches of pixels: image (B, 3, H, W) in [-1, 1] -> mean (B, C, H / p, W / p).

    Args:
        weight: (C, 3, p, p).
        bias: (C,).
    """

    outputs = ("mean",)

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        channels, _, patch_px, _ = weight.shape
        self.patches = nn.Conv2d(3, channels, patch_px, stride=patch_px)
        self.patches.weight = nn.Parameter(weight, requires_grad=False)
        self.patches.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        mean: Tensor = self.patches(image)
        return mean


def decoder_of(vae: nn.Module) -> Decoder:
    """The decoder of an autoencoder class that is known to keep the contract."""
    if not isinstance(vae, AutoencoderTiny | AutoencoderKL):
        raise ExportError(f"no decoder for {type(vae).__name__}; AutoencoderTiny and AutoencoderKL are known")
    return Decoder(vae)
