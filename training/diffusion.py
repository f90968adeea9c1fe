"""Trains the text encoder and the denoiser together, in one process a core that average their gradients.

v-prediction with zero terminal SNR (Salimans & Ho 2022; Lin et al. 2023),
caption dropout for classifier-free guidance, an exponential moving average of
the weights. A run that was stopped goes on from its checkpoint with the same
batches and noise that it would have had.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from training import checkpoint, networks
from training.data import Batches
from training.recipe import Recipe

CHECKPOINT_EVERY_S = 240.0
LOG_EVERY = 50


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
    """A fresh model, the same for a seed."""
    networks.seed_everything(recipe.seed)
    return Model(networks.text_encoder(recipe, tokens), networks.denoiser(recipe))


def learning_rate(recipe: Recipe, samples: int) -> float:
    """Warm-up, plateau, linear decay to a hundredth."""
    warm = min(1.0, samples / recipe.warmup_samples)
    left = (recipe.diffusion_samples - samples) / (recipe.decay_fraction * recipe.diffusion_samples)
    return recipe.learning_rate * warm * max(0.01, min(1.0, left))


def train(recipe: Recipe, folder: Path, tokens: CLIPTokenizer, rank: int, world: int) -> None:
    """Trains up to `recipe.diffusion_samples`; rank 0 writes checkpoints and the log."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nothing listens but on loopback
        dist.init_process_group(
            "gloo", init_method=f"file://{(folder / 'rendezvous').resolve()}", rank=rank, world_size=world
        )
    model = build(recipe, tokens)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=recipe.weight_decay, fused=True)
    path = folder / "diffusion.pt"
    step, spent = 0, 0.0
    if (state := checkpoint.load(path)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["average"], state["step"], state["cpu_s"]
        samples = step * recipe.batch_size * world
        print(f"rank {rank}: resuming at {samples} samples", flush=True)
    latents = torch.from_numpy(np.load(folder / "latents.npy", mmap_mode="c"))
    alphas = networks.noise_schedule().alphas_cumprod
    batches = Batches(recipe, rank, world)
    started, saved, losses = time.process_time(), time.monotonic(), []
    while (samples := step * recipe.batch_size * world) < recipe.diffusion_samples:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, samples)
        losses.append(_step(model, optimizer, latents, alphas, batches, tokens, recipe, step, rank, world))
        step += 1
        _average(average, model, min(recipe.ema_decay, (1 + step) / (10 + step)))
        if rank:
            continue
        cpu_s = spent + world * (time.process_time() - started)
        if step % LOG_EVERY == 0:
            _log(folder, samples, float(np.mean(losses)), cpu_s)
            losses.clear()
        if (
            time.monotonic() - saved > CHECKPOINT_EVERY_S
            or samples + recipe.batch_size * world >= recipe.diffusion_samples
        ):
            checkpoint.save(
                path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step,
                    "cpu_s": cpu_s,
                    "samples": step * recipe.batch_size * world,
                },
            )
            saved = time.monotonic()


def _step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    latents: Tensor,
    alphas: Tensor,
    batches: Batches,
    tokens: CLIPTokenizer,
    recipe: Recipe,
    step: int,
    rank: int,
    world: int,
) -> float:
    picks, captions = batches.at(step)
    ids = tokens(captions, padding="max_length", truncation=True, max_length=recipe.max_tokens, return_tensors="pt")
    generator = torch.Generator().manual_seed(hash((recipe.seed, step, rank)) & 0x7FFFFFFF)
    clean = latents[picks].float()
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(0, len(alphas), (len(picks),), generator=generator)
    signal = alphas[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(signal * clean + sigma * noise, timesteps, ids.input_ids)
    loss = nn.functional.mse_loss(predicted.float(), signal * noise - sigma * clean)
    optimizer.zero_grad()
    loss.backward()
    if world > 1:
        _share_gradients(model, world)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _share_gradients(model: Model, world: int) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world
    dist.all_reduce(flat)
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()


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
