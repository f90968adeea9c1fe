"""The networks: classes of diffusers and transformers in small configurations."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.recipe import Recipe


def tokenizer(recipe: Recipe, texts: Iterable[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with a byte-pair vocabulary built from `texts`."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    blank = CLIPTokenizer(
        vocab={start: 0, end: 1}, merges=[], unk_token=end, bos_token=start, eos_token=end, pad_token=end
    )
    trained = blank.train_new_from_iterator(texts, vocab_size=recipe.vocab_size)
    trained.model_max_length = recipe.max_tokens
    return trained


def text_encoder(recipe: Recipe, tokens: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text model, trained with the denoiser."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=recipe.text_width,
            intermediate_size=2 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=recipe.text_heads,
            max_position_embeddings=recipe.max_tokens,
            hidden_act="gelu",
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def denoiser(recipe: Recipe) -> UNet2DConditionModel:
    """A small UNet; cross-attention at the lower resolution. `attention_head_dim` is the number of heads here."""
    return UNet2DConditionModel(
        sample_size=recipe.latent_px,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.unet_heads,
        norm_num_groups=recipe.norm_groups,
        use_linear_projection=True,
    )


def autoencoder(recipe: Recipe, channels: int, blocks: tuple[int, ...]) -> AutoencoderTiny:
    """An AutoencoderTiny of which only the decoder is used; `latents.py` is the encoder."""
    same = (channels,) * len(blocks)
    return AutoencoderTiny(
        latent_channels=recipe.latent_channels,
        encoder_block_out_channels=same,
        decoder_block_out_channels=same,
        num_encoder_blocks=(0,) * len(blocks),
        num_decoder_blocks=blocks,
        scaling_factor=recipe.scaling_factor,
    )


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's schedule, rescaled to zero terminal SNR (Lin et al. 2023), v-prediction, trailing."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def has_bfloat16() -> bool:
    """Whether the CPU computes with bfloat16; emulated (AVX2), it takes twenty times as long as float32."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def autocast() -> torch.autocast:
    """Autocast to bfloat16 if the CPU has it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())


def seed_everything(seed: int) -> None:
    """Seeds the random generators of torch and Python."""
    random.seed(seed)
    torch.manual_seed(seed)
