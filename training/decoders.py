"""Trains the decoder and the cheaper preview decoder on latents of drawn icons, in several processes as `diffusion`.

The loss is the absolute error plus that of the pictures' gradients, which keeps
edges sharp. A little noise is added to the latents, since those of the denoiser are
not exact.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from training import checkpoint, networks, parallel
from training.data import pictures
from training.latents import Projection
from training.recipe import Recipe

CHECKPOINT_EVERY_S = 120.0
HELD_OUT = 256
"""Number of icons after the training icons that are used for the PSNR."""


def num_processes(recipe: Recipe, workers: int) -> int:
    """A number of processes with equal shares of a batch, so that the mean of their gradients is the batch's."""
    return math.gcd(recipe.decoder_batch_size, workers)


def train_all(recipe: Recipe, folder: Path, encoder: Projection, rank: int, world: int) -> None:
    """Trains both decoders; rank 0 writes them, and their PSNR and the linear preview's to `decoders.json`."""
    images = pictures(recipe, range(recipe.decoder_icons))
    test = pictures(recipe, range(recipe.num_icons, recipe.num_icons + HELD_OUT))
    scores = {"linear_preview": _linear_psnr(recipe, encoder, test)}
    for name, channels, blocks in (
        ("decoder", recipe.decoder_channels, recipe.decoder_blocks),
        ("preview_decoder", recipe.preview_channels, recipe.preview_blocks),
    ):
        networks.seed_everything(recipe.seed)
        model = networks.autoencoder(recipe, channels, blocks).to(memory_format=torch.channels_last)
        _train(Job(recipe, folder, name, encoder, images, rank, world), model)
        if rank:
            continue
        scores[name] = _psnr(recipe, model, encoder, test)
        print(f"{name}: {scores[name]:.2f} dB on held-out icons", flush=True)
    if rank == 0:
        (folder / "decoders.json").write_text(json.dumps(scores, indent=1))


def decode(model: AutoencoderTiny, recipe: Recipe, latents: Tensor) -> Tensor:
    """Decodes latents at the denoiser's scale, (B, C, h, w), to (B, 3, H, W) in [-1, 1], unclamped."""
    image: Tensor = model.decode(latents / recipe.scaling_factor).sample
    return image


@dataclass(frozen=True)
class Job:
    """One process' part in the training of one decoder on `images`, (N, S, S, 3) uint8."""

    recipe: Recipe
    folder: Path
    name: str
    encoder: Projection
    images: npt.NDArray[np.uint8]
    rank: int
    world: int

    def share(self, step: int) -> tuple[Tensor, npt.NDArray[np.uint8]]:
        """This process' share of the batch of `step`: noisy latents (B / world, C, h, w) and their pictures."""
        rng = np.random.default_rng([self.recipe.seed, step])
        picks = rng.integers(len(self.images), size=self.recipe.decoder_batch_size)
        batch = self.images[picks[self.rank :: self.world]]
        clean = self.encoder.encode(batch)
        noise = rng.standard_normal((len(picks), *clean.shape[1:]), np.float32)[self.rank :: self.world]
        return torch.from_numpy(clean + self.recipe.latent_noise * noise), batch


def _train(job: Job, model: AutoencoderTiny) -> None:
    recipe, name = job.recipe, job.name
    for layer in model.decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data *= 0.7
    path = job.folder / f"{name}.pt"
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
        latents, batch = job.share(step)
        with networks.autocast():
            image = decode(model, recipe, latents).float()
        loss = _loss(image, _target(batch, image.shape[-1]))
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(model.decoder, job.world)
        optimizer.step()
        if job.rank:
            continue
        if step % 100 == 0:
            print(f"{name}: step {step}/{steps} loss {float(loss.detach()):.4f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_EVERY_S or step == steps - 1:
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


def _target(images: npt.NDArray[np.uint8], size_px: int) -> Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return nn.functional.interpolate(pixels, size=size_px, mode="area") if pixels.shape[-1] != size_px else pixels


@torch.no_grad()
def _psnr(recipe: Recipe, model: AutoencoderTiny, encoder: Projection, images: npt.NDArray[np.uint8]) -> float:
    image = decode(model.eval(), recipe, torch.from_numpy(encoder.encode(images))).clamp(-1, 1)
    return float(10 * torch.log10(4 / (image - _target(images, image.shape[-1])).square().mean()))


def _linear_psnr(recipe: Recipe, encoder: Projection, images: npt.NDArray[np.uint8]) -> float:
    weights, bias = encoder.linear_preview(recipe.linear_block)
    block, edge = recipe.linear_block, recipe.latent_px
    flat = encoder.encode(images).transpose(0, 2, 3, 1) @ weights + bias
    grid = flat.reshape(-1, edge, edge, 3, block, block).transpose(0, 3, 1, 4, 2, 5)
    image = grid.reshape(len(images), 3, edge * block, edge * block)
    error = np.clip(image, -1, 1) - _target(images, edge * block).numpy()
    return float(10 * np.log10(4 / np.mean(error**2)))
