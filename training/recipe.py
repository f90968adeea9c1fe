"""Every number of the recipe, in one place; everything else in `training` follows from these and the seed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """How `icons` is trained.

    Attributes:
        latent_channels: number of principal components kept of each patch of `patch_px` x `patch_px` pixels.
        scaling_factor: the denoiser sees latents of unit variance, the decoder those divided by this, which keeps them
            in the near-linear part of AutoencoderTiny's tanh.
        diffusion_samples: number of training samples of the denoiser. 192,000, with 20,000 for each decoder (21.5 dB),
            were too few: the object was right on 0.944 and the colour on 0.896 of the held-out captions.
        learning_rate: reached after `warmup_samples`, then constant, then decayed over the last `decay_fraction`.
    """

    seed: int = 20
    num_icons: int = 80_000
    size_px: int = 128
    patch_px: int = 16
    latent_channels: int = 32
    scaling_factor: float = 4.0
    linear_block: int = 4

    max_tokens: int = 32
    vocab_size: int = 768
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4

    unet_channels: tuple[int, ...] = (128, 160)
    unet_heads: int = 4
    norm_groups: int = 16

    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_samples: int = 10_000
    decay_fraction: float = 0.25
    caption_dropout: float = 0.1
    ema_decay: float = 0.9995
    diffusion_samples: int = 400_000

    decoder_channels: int = 40
    decoder_blocks: tuple[int, ...] = (3, 3, 2, 1, 0)
    preview_channels: int = 32
    preview_blocks: tuple[int, ...] = (2, 1, 1, 0)
    decoder_icons: int = 6_000
    decoder_samples: int = 60_000
    decoder_batch_size: int = 16
    decoder_learning_rate: float = 2e-3
    latent_noise: float = 0.05

    @property
    def latent_px(self) -> int:
        """Edge of the latent."""
        return self.size_px // self.patch_px


RECIPE = Recipe()
