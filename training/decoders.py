"""Trains the decoder and the cheaper preview decoder on latents of drawn icons.

Absolute error plus the error of its gradients, which keeps edges clean; a
little noise on the latents, since the denoiser's are never exact.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from training import checkpoint, networks
from training.data import pictures
from training.latents import Projection
from training.recipe import Recipe

HELD_OUT = 256
"""Icons past the training ones, for the PSNR."""


def train_all(recipe: Recipe, folder: Path, encoder: Projection) -> None:
    """Both decoders, and their and the linear preview's PSNR in `decoders.json`."""
    torch.set_num_threads(1)
    images = pictures(recipe, range(recipe.decoder_icons))
    test = pictures(recipe, range(recipe.num_icons, recipe.num_icons + HELD_OUT))
    scores = {"linear_preview": _linear_psnr(recipe, encoder, test)}
    for name, channels, blocks in (
        ("decoder", recipe.decoder_channels, recipe.decoder_blocks),
        ("preview_decoder", recipe.preview_channels, recipe.preview_blocks),
    ):
        model = networks.autoencoder(recipe, channels, blocks)
        _train(recipe, folder, name, model, encoder, images)
        scores[name] = _psnr(recipe, model, encoder, test)
        print(f"{name}: {scores[name]:.2f} dB on held-out icons", flush=True)
    (folder / "decoders.json").write_text(json.dumps(scores, indent=1))


def decode(model: AutoencoderTiny, recipe: Recipe, latents: Tensor) -> Tensor:
    """Latents as the denoiser sees them, (B, C, h, w) -> (B, 3, H, W) in [-1, 1], unclamped."""
    image: Tensor = model.decode(latents / recipe.scaling_factor).sample
    return image


def _train(
    recipe: Recipe, folder: Path, name: str, model: AutoencoderTiny, encoder: Projection, images: np.ndarray
) -> None:
    networks.seed_everything(recipe.seed)
    for layer in model.decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data *= 0.7
    path = folder / f"{name}.pt"
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=0.0, fused=True)
    first = 0
    if (state := checkpoint.load(path)) is not None:
        model.decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    steps = recipe.decoder_samples // recipe.decoder_batch_size
    saved = time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.decoder_learning_rate * min(1.0, step / 50) * (1 - step / steps)
        rng = np.random.default_rng([recipe.seed, step])
        batch = images[rng.integers(len(images), size=recipe.decoder_batch_size)]
        latents = torch.from_numpy(encoder.encode(batch))
        latents = latents + recipe.latent_noise * torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        with networks.autocast():
            image = decode(model, recipe, latents).float()
        loss = _loss(image, _target(batch, image.shape[-1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"{name}: step {step}/{steps} loss {float(loss.detach()):.4f}", flush=True)
        if time.monotonic() - saved > 120 or step == steps - 1:
            checkpoint.save(
                path,
                {"decoder": model.decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            )
            saved = time.monotonic()


def _loss(image: Tensor, target: Tensor) -> Tensor:
    loss = (image - target).abs().mean()
    for axis in (-1, -2):
        loss = loss + (image.diff(dim=axis) - target.diff(dim=axis)).abs().mean()
    return loss


def _target(images: np.ndarray, size_px: int) -> Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return nn.functional.interpolate(pixels, size=size_px, mode="area") if pixels.shape[-1] != size_px else pixels


@torch.no_grad()
def _psnr(recipe: Recipe, model: AutoencoderTiny, encoder: Projection, images: np.ndarray) -> float:
    image = decode(model.eval(), recipe, torch.from_numpy(encoder.encode(images))).clamp(-1, 1)
    return float(10 * torch.log10(4 / (image - _target(images, image.shape[-1])).square().mean()))


def _linear_psnr(recipe: Recipe, encoder: Projection, images: np.ndarray) -> float:
    weights, bias = encoder.linear_preview(recipe.linear_block)
    block, edge = recipe.linear_block, recipe.latent_px
    flat = encoder.encode(images).transpose(0, 2, 3, 1) @ weights + bias
    grid = flat.reshape(-1, edge, edge, 3, block, block).transpose(0, 3, 1, 4, 2, 5)
    image = grid.reshape(len(images), 3, edge * block, edge * block)
    error = np.clip(image, -1, 1) - _target(images, edge * block).numpy()
    return float(10 * np.log10(4 / np.mean(error**2)))
