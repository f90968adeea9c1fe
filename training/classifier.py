"""Trains the classifier of drawn icons that judges generated pictures.

It learns object, colour, background, sparkles and tilt.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from training import checkpoint
from training.icons import BACKGROUNDS, COLOURS, OBJECTS, Spec, sample_spec
from training.icons.render import PLAIN, Style, render

EDGE_PX = 64
NUM_DRAWINGS = 24_000
EPOCHS = 6
BATCH = 64
CHUNK = 100
TILTS = (None, "left", "right")
HEADS: dict[str, Sequence[object]] = {
    "object": list(OBJECTS),
    "colour": list(COLOURS),
    "background": list(BACKGROUNDS),
    "sparkles": (False, True),
    "tilt": TILTS,
}


class Classifier(nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> logits by head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 96, 128):
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 16, len(labels)) for name, labels in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}


def labels(spec: Spec) -> list[int]:
    """The class of a spec in each head."""
    return [values.index(getattr(spec, name)) for name, values in HEADS.items()]


def shrink(images: npt.NDArray[np.uint8]) -> Tensor:
    """(N, S, S, 3) uint8 of any size to what the classifier sees."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return nn.functional.interpolate(pixels, size=EDGE_PX, mode="area")


def draw(count: int, seed: str, styles: Sequence[Style] = (PLAIN,)) -> tuple[npt.NDArray[np.uint8], Tensor]:
    """Fresh drawings at the classifier's size and their labels, (N, heads); drawn by a process on each core.

    Args:
        styles: taken in turns.
    """
    rng = random.Random(seed)
    specs = [sample_spec(rng) for _ in range(count)]
    in_turns = [styles[number % len(styles)] for number in range(count)]
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")) as pool:
        small = np.stack(list(pool.map(_small, specs, in_turns, chunksize=CHUNK)))
    return small, torch.tensor([labels(spec) for spec in specs])


def _small(spec: Spec, style: Style) -> npt.NDArray[np.uint8]:
    half = render(spec, style=style).reshape(EDGE_PX, 2, EDGE_PX, 2, 3).mean(axis=(1, 3))
    return np.round(half).astype(np.uint8)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def train(path: Path, styles: Sequence[Style] = (PLAIN,), num_drawings: int = NUM_DRAWINGS) -> Classifier:
    """Trains on drawings of these styles, or loads what was trained before."""
    torch.manual_seed(0)
    model = Classifier()
    if (state := checkpoint.load(path)) is not None:
        model.load_state_dict(state["model"])
        return model.eval()
    images, wanted = draw(num_drawings, "classifier", styles)
    steps = EPOCHS * num_drawings // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        picks = rng.integers(num_drawings, size=BATCH)
        batch = _augment(torch.from_numpy(images[picks]).permute(0, 3, 1, 2).float() / 255, rng)
        logits = model(batch)
        losses = [nn.functional.cross_entropy(logits[name], wanted[picks, at]) for at, name in enumerate(HEADS)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"classifier: step {step}/{steps} loss {float(loss.detach()):.3f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {"model": model.state_dict()})
    return model.eval()


def _augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Small shifts, blur and noise: generated pictures are not as crisp as drawings."""
    dx, dy = (int(shift) for shift in rng.integers(-2, 3, size=2))
    images = torch.roll(images, (dy, dx), (2, 3))
    if rng.random() < 0.4:
        images = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images + 0.02 * torch.randn_like(images)


@torch.no_grad()
def predict(model: Classifier, images: Tensor) -> npt.NDArray[np.int64]:
    """The class in each head, (N, heads)."""
    parts = [model(part) for part in images.split(256)]
    return torch.stack([torch.cat([p[name] for p in parts]).argmax(dim=1) for name in HEADS], dim=1).numpy()
