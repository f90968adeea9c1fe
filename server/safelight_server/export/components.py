"""Wraps the networks so that names and shapes of inputs and outputs are those of the server's components."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Qwen3Model, T5EncoderModel

from safelight_server.export.adapters import Adapters, given
from safelight_server.export.ip_adapter import ImagePrompts, given_image
from safelight_server.export.networks import FLUX_PATCH, Z_IMAGE_TIMESTEPS
from safelight_server.export.source import ExportError

FLUX_TIMESTEPS = 1000
"""What diffusers' pipeline divides timesteps by."""


class TextEncoder(nn.Module):
    """input_ids (B, T) int64 -> last_hidden_state (B, T, D), pooled_output (B, P).

    Args:
        adapters: of `model`, which then is given adapter_weights (B, R, Q) and adapter_scales (B, R) too.
    """

    outputs = ("last_hidden_state", "pooled_output")

    def __init__(self, model: CLIPTextModel, adapters: Adapters | None = None) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters

    def forward(
        self,
        input_ids: Tensor,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        with given(self.adapters, adapter_weights, adapter_scales, adapter_rows):
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
        adapters: of both encoders, which then are given adapter_weights (B, R, Q) and adapter_scales (B, R) too.
    """

    outputs = ("last_hidden_state", "pooled_output")

    def __init__(
        self,
        first: CLIPTextModel,
        second: CLIPTextModelWithProjection,
        empty_ids: Tensor | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.adapters = adapters
        self.register_buffer("empty_ids", empty_ids)

    def forward(
        self,
        input_ids: Tensor,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        first_ids, second_ids = input_ids.chunk(2, dim=1)
        with given(self.adapters, adapter_weights, adapter_scales, adapter_rows):
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

    def __init__(
        self, model: UNet2DConditionModel, adapters: Adapters | None = None, image_prompts: ImagePrompts | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.image_prompts = image_prompts

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        image_prompt_tokens: Tensor | None = None,
        image_prompt_scale: Tensor | None = None,
        mask: Tensor | None = None,
        masked_image: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        with (
            given(self.adapters, adapter_weights, adapter_scales, adapter_rows),
            given_image(self.image_prompts, image_prompt_tokens, image_prompt_scale),
        ):
            prediction: Tensor = self.model(
                _with_mask(sample, mask, masked_image),
                timestep,
                encoder_hidden_states,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        return prediction


class Denoiser(nn.Module):
    """sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, T, D) -> prediction (B, C, h, w).

    A UNet that inpaints is given mask (B, 1, h, w) and masked_image (B, C, h, w) too.

    Args:
        adapters: of `model`, which then is given adapter_weights (B, R, Q) and adapter_scales (B, R) too. With
            adapter_rows (A,) int64 these are of the rows at A places in the batch alone, and no other row has any.
        image_prompts: of `model`, which then is given image_prompt_tokens (B, T, D) and image_prompt_scale (B,) too.
    """

    outputs = ("prediction",)

    def __init__(
        self, model: UNet2DConditionModel, adapters: Adapters | None = None, image_prompts: ImagePrompts | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.image_prompts = image_prompts

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        image_prompt_tokens: Tensor | None = None,
        image_prompt_scale: Tensor | None = None,
        mask: Tensor | None = None,
        masked_image: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> Tensor:
        with (
            given(self.adapters, adapter_weights, adapter_scales, adapter_rows),
            given_image(self.image_prompts, image_prompt_tokens, image_prompt_scale),
        ):
            prediction: Tensor = self.model(
                _with_mask(sample, mask, masked_image), timestep, encoder_hidden_states, return_dict=False
            )[0]
        return prediction


def _with_mask(sample: Tensor, mask: Tensor | None, masked_image: Tensor | None) -> Tensor:
    """What the UNet takes: one that inpaints the latent, the mask, the picture's latent, (B, 2 C + 1, h, w)."""
    if mask is None or masked_image is None:
        return sample
    return torch.cat([sample, mask, masked_image], dim=1)


class FluxTextEncoders(nn.Module):
    """Both text encoders of FLUX: input_ids (B, T1 + T2) int64 -> last_hidden_state (B, T2, D), pooled_output (B, P).

    The ids are those of CLIP's tokenizer and behind them those of T5's. The hidden states are T5's, which reads its
    padding too, as in diffusers; the pooled output is CLIP's.

    Args:
        num_clip_tokens: T1.
        adapters: of CLIP, which then is given adapter_weights (B, R, Q) and adapter_scales (B, R) too.
    """

    outputs = ("last_hidden_state", "pooled_output")

    def __init__(
        self, clip: CLIPTextModel, t5: T5EncoderModel, num_clip_tokens: int, adapters: Adapters | None = None
    ) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5
        self.num_clip_tokens = num_clip_tokens
        self.adapters = adapters

    def forward(
        self,
        input_ids: Tensor,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        clip_ids, t5_ids = input_ids[:, : self.num_clip_tokens], input_ids[:, self.num_clip_tokens :]
        with given(self.adapters, adapter_weights, adapter_scales, adapter_rows):
            pooled = self.clip(input_ids=clip_ids).pooler_output
        return self.t5(input_ids=t5_ids).last_hidden_state, pooled


class StableDiffusion3TextEncoders(nn.Module):
    """The three text encoders of Stable Diffusion 3: input_ids (B, 2 T1 + T3) int64 -> as below.

    last_hidden_state (B, T1 + T3, D): the hidden states of both CLIP encoders before their last layers, side by side
    and padded with zeros to the width of T5's, and behind them T5's; pooled_output (B, P1 + P2): their projections
    (Esser et al. 2024, section 4). T5 reads its padding too, as in diffusers.

    Args:
        num_clip_tokens: T1.
        adapters: of both CLIP encoders, which then are given adapter_weights (B, R, Q) and adapter_scales (B, R) too.
    """

    outputs = ("last_hidden_state", "pooled_output")

    def __init__(
        self,
        first: CLIPTextModelWithProjection,
        second: CLIPTextModelWithProjection,
        t5: T5EncoderModel,
        num_clip_tokens: int,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__()
        self.first, self.second, self.t5 = first, second, t5
        self.num_clip_tokens = num_clip_tokens
        self.adapters = adapters

    def forward(
        self,
        input_ids: Tensor,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        length = self.num_clip_tokens
        with given(self.adapters, adapter_weights, adapter_scales, adapter_rows):
            one = self.first(input_ids=input_ids[:, :length], output_hidden_states=True)
            two = self.second(input_ids=input_ids[:, length : 2 * length], output_hidden_states=True)
        of_t5 = self.t5(input_ids=input_ids[:, 2 * length :]).last_hidden_state
        of_clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        of_clip = nn.functional.pad(of_clip, (0, of_t5.shape[-1] - of_clip.shape[-1]))
        return torch.cat([of_clip, of_t5], dim=1), torch.cat([one.text_embeds, two.text_embeds], dim=-1)


class StableDiffusion3Denoiser(nn.Module):
    """Beside `Denoiser`'s inputs pooled_projections (B, P); the prediction is the velocity, noise less latent."""

    outputs = ("prediction",)

    def __init__(self, model: SD3Transformer2DModel, adapters: Adapters | None = None) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> Tensor:
        with given(self.adapters, adapter_weights, adapter_scales, adapter_rows):
            prediction: Tensor = self.model(
                hidden_states=sample,
                timestep=timestep,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                return_dict=False,
            )[0]
        return prediction


class FluxDenoiser(nn.Module):
    """As `StableDiffusion3Denoiser`, and guidance (B,) where the network was distilled with it.

    A latent (B, C, h, w) becomes h / 2 * w / 2 tokens of 4 C values, whose places the network is told; its timesteps
    end at 1.
    """

    outputs = ("prediction",)

    def __init__(self, model: FluxTransformer2DModel, adapters: Adapters | None = None) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> Tensor:
        rows, channels, height, width = sample.shape
        down, across = height // FLUX_PATCH, width // FLUX_PATCH
        packed = sample.reshape(rows, channels, down, FLUX_PATCH, across, FLUX_PATCH).permute(0, 2, 4, 1, 3, 5)
        packed = packed.reshape(rows, down * across, channels * FLUX_PATCH * FLUX_PATCH)
        of_row, of_column = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
        places = torch.stack([torch.zeros_like(of_row), of_row, of_column], dim=-1).reshape(down * across, 3)
        with given(self.adapters, adapter_weights, adapter_scales, adapter_rows):
            predicted = self.model(
                hidden_states=packed,
                timestep=timestep / FLUX_TIMESTEPS,
                guidance=guidance,
                pooled_projections=pooled_projections,
                encoder_hidden_states=encoder_hidden_states,
                txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
                img_ids=places.to(sample.dtype),
                return_dict=False,
            )[0]
        predicted = predicted.reshape(rows, down, across, channels, FLUX_PATCH, FLUX_PATCH).permute(0, 3, 1, 4, 2, 5)
        prediction: Tensor = predicted.reshape(rows, channels, height, width)
        return prediction


class ZImageTextEncoder(nn.Module):
    """The text encoder of Z-Image: input_ids (B, T) int64 -> last_hidden_state (B, T, D), attention_mask (B, T).

    The hidden states are those before the last layer, and 0 behind a prompt. The mask is 1 for the tokens of a prompt
    and 0 for the padding behind it.
    """

    outputs = ("last_hidden_state", "attention_mask")

    def __init__(self, model: Qwen3Model, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        # The name of the padding's token may stand in a prompt, so only what nothing else follows is padding.
        is_text = (input_ids != self.pad_id).flip(1).cumsum(1).flip(1) > 0
        # -2 alone, as the states of all layers would take 190 MB a row at the real size.
        result = self.model(
            input_ids=input_ids, attention_mask=is_text, output_hidden_states=[-2], use_cache=False
        ).hidden_states[-2]
        return result.masked_fill(~is_text[..., None], 0.0), is_text.to(result.dtype)


class ZImageDenoiser(nn.Module):
    """Beside `Denoiser`'s inputs encoder_attention_mask (B, T), as `ZImageTextEncoder` makes it.

    Each row is given the tokens of its own prompt and no others, so that prompts of different lengths share a call:
    the network pads and masks them row by row. Its times go from 0 to 1, and it predicts latent less noise; the
    prediction here is the velocity, noise less latent.
    """

    outputs = ("prediction",)

    def __init__(self, model: ZImageTransformer2DModel, adapters: Adapters | None = None) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        adapter_weights: Tensor | None = None,
        adapter_scales: Tensor | None = None,
        adapter_rows: Tensor | None = None,
    ) -> Tensor:
        lengths = (encoder_attention_mask > 0).sum(dim=1).tolist()
        prompts = [states[:length] for states, length in zip(encoder_hidden_states, lengths, strict=True)]
        times = (Z_IMAGE_TIMESTEPS - timestep) / Z_IMAGE_TIMESTEPS
        with given(self.adapters, adapter_weights, adapter_scales, adapter_rows):
            predicted = self.model(list(sample.unsqueeze(2)), times, prompts, return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)


class Decoder(nn.Module):
    """latent (B, C, h, w), divided by the scaling factor -> image (B, 3, H, W) in [-1, 1], unclamped.

    A preview decoder may count on a scaling factor of its own: `scale` is the pipeline's by its, and `shift` what the
    pipeline's decoder is given more.
    """

    outputs = ("image",)

    def __init__(self, vae: AutoencoderTiny | AutoencoderKL, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.vae = vae
        self.scale, self.shift = scale, shift

    def forward(self, latent: Tensor) -> Tensor:
        shifted = latent if self.shift == 0.0 else latent - self.shift
        scaled = shifted if self.scale == 1.0 else shifted * self.scale
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
