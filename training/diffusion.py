"""Trains the text encoder and the denoiser together, in one process a core that average their gradients.

v-prediction with zero terminal SNR (Salimans & Ho 2022; Lin et al. 2023),
caption dropout for classifier-free guidance, an exponential moving average of
the weights. A run that was stopped continues from its checkpoint with the same
batches and noise as without the stop.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from training import checkpoint, networks, parallel
from training.data import Batches
from training.recipe import Recipe

CHECKPOINT_EVERY_S = 240.0
LOG_EVERY = 50
CHECKPOINT = "diffusion.pt"


class Model(nn.Module):
    """The text encoder and the denoiser as one set of weights."""

    def __init__(self, text: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text = text
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """(B, C, h, w), (B,), (B, T) -> v (B, C, h, w)."""
        states = self.text(input_ids=ids).last_hidden_state
        velocity: Tensor = self.unet(noisy, timesteps, states).sample
        return velocity


def build(recipe: Recipe, tokens: CLIPTokenizer) -> Model:
    """Makes a new model; equal seeds give equal weights."""
    networks.seed_everything(recipe.seed)
    return Model(networks.text_encoder(recipe, tokens), networks.denoiser(recipe))


def learning_rate(recipe: Recipe, samples: int) -> float:
    """Warm-up, plateau, linear decay to a hundredth."""
    warm = min(1.0, samples / recipe.warmup_samples)
    left = (recipe.diffusion_samples - samples) / (recipe.decay_fraction * recipe.diffusion_samples)
    return recipe.learning_rate * warm * max(0.01, min(1.0, left))


@dataclass
class Run:
    """One process of a training run: its model, its data, and its progress."""

    recipe: Recipe
    rank: int
    world: int
    tokens: CLIPTokenizer
    model: Model
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    batches: Batches
    latents: Tensor
    alphas: Tensor
    step: int = 0
    cpu_s: float = 0.0

    @property
    def samples(self) -> int:
        """Number of samples that all processes together have used."""
        return self.step * self.recipe.batch_size * self.world

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint, which may come from another number of processes."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.cpu_s = state["average"], state["cpu_s"]
        self.step = state["samples"] // (self.recipe.batch_size * self.world)

    def state(self) -> dict[str, Any]:
        """The checkpoint for `restore`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "samples": self.samples,
            "cpu_s": self.cpu_s,
        }

    def advance(self) -> float:
        """Makes one step and returns its loss in this process."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.samples)
        loss = self._loss(*self.batches.at(self.step))
        self.optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(self.model, self.world)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        _average(self.average, self.model, min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step)))
        return float(loss.detach())

    def _loss(self, picks: npt.NDArray[np.int64], captions: list[str]) -> Tensor:
        ids = self.tokens(
            captions, padding="max_length", truncation=True, max_length=self.recipe.max_tokens, return_tensors="pt"
        ).input_ids
        generator = torch.Generator().manual_seed(hash((self.recipe.seed, self.step, self.rank)) & 0x7FFFFFFF)
        clean = self.latents[picks].float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, len(self.alphas), (len(picks),), generator=generator)
        signal = self.alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - self.alphas[timesteps]).sqrt()[:, None, None, None]
        with networks.autocast():
            predicted = self.model(signal * clean + sigma * noise, timesteps, ids)
        return nn.functional.mse_loss(predicted.float(), signal * noise - sigma * clean)


def begin(recipe: Recipe, folder: Path, tokens: CLIPTokenizer, rank: int, world: int) -> Run:
    """Starts a run from its seed, or from the checkpoint in `folder`."""
    model = build(recipe, tokens)
    run = Run(
        recipe=recipe,
        rank=rank,
        world=world,
        tokens=tokens,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=recipe.weight_decay, fused=True),
        average={name: value.detach().clone() for name, value in model.state_dict().items()},
        batches=Batches(recipe, rank, world),
        latents=torch.from_numpy(np.load(folder / "latents.npy", mmap_mode="c")),
        alphas=networks.noise_schedule().alphas_cumprod,
    )
    if (state := checkpoint.load(folder / CHECKPOINT)) is not None:
        run.restore(state)
        print(f"rank {rank}: resuming at {run.samples} samples", flush=True)
    return run


def train(recipe: Recipe, folder: Path, tokens: CLIPTokenizer, rank: int, world: int) -> None:
    """Trains up to `recipe.diffusion_samples`; rank 0 writes checkpoints and the log."""
    run = begin(recipe, folder, tokens, rank, world)
    losses: list[float] = []
    counted, saved = time.process_time(), time.monotonic()
    while run.samples < recipe.diffusion_samples:
        losses.append(run.advance())
        now = time.process_time()
        run.cpu_s, counted = run.cpu_s + world * (now - counted), now
        if rank:
            continue
        if run.step % LOG_EVERY == 0:
            _log(folder, run.samples, float(np.mean(losses)), run.cpu_s)
            losses.clear()
        if time.monotonic() - saved > CHECKPOINT_EVERY_S or run.samples >= recipe.diffusion_samples:
            checkpoint.save(folder / CHECKPOINT, run.state())
            saved = time.monotonic()


@torch.no_grad()
def _average(average: dict[str, Tensor], model: Model, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)


def _log(folder: Path, samples: int, loss: float, cpu_s: float) -> None:
    line = {"samples": samples, "loss": round(loss, 4), "cpu_s": round(cpu_s), "at": time.strftime("%H:%M:%S")}
    print(json.dumps(line), flush=True)
    with (folder / "diffusion.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
