"""Writes checkpoints atomically: to a temporary file, synced, then renamed, so that a kill never leaves half of one."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def save(path: Path, state: dict[str, object]) -> None:
    """Replaces the checkpoint atomically."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def load(path: Path) -> dict[str, object] | None:
    """Loads the checkpoint; None if there is none yet."""
    if not path.exists():
        return None
    state: dict[str, object] = torch.load(path, map_location="cpu", weights_only=True)
    return state
