"""`python -m training.train`: trains a model from a seed and writes it as a diffusers folder.

Stages, each skipped if its result exists: projection → latents → tokenizer
→ diffusion → decoders → pipeline. It may be interrupted at any time: the same
command continues.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from training import checkpoint, decoders, diffusion, networks, parallel
from training.data import captions, draw_latents, pictures
from training.latents import Projection, fit
from training.recipe import RECIPE, Recipe
from training.save import save_pipeline

PROJECTION_ICONS = 2_000


def projection(recipe: Recipe, folder: Path) -> Projection:
    """Fits the linear encoder on the first icons."""
    path = folder / "projection.npz"
    if not path.exists():
        found = fit(recipe, pictures(recipe, range(PROJECTION_ICONS)))
        np.savez(path, mean=found.mean, basis=found.basis, scale=found.scale)
    with np.load(path) as arrays:
        return Projection(arrays["mean"], arrays["basis"], arrays["scale"], recipe.patch_px)


def prepare(recipe: Recipe, folder: Path, workers: int) -> tuple[Projection, CLIPTokenizer]:
    """Prepares the data on which the networks are trained."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = projection(recipe, folder)
    if not (folder / "latents.npy").exists():
        draw_latents(recipe, encoder, folder / "latents.npy", workers)
    if not (folder / "tokenizer").exists():
        networks.tokenizer(recipe, captions(recipe, 20_000)).save_pretrained(folder / "tokenizer")
    return encoder, CLIPTokenizer.from_pretrained(folder / "tokenizer")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="work and results")
    parser.add_argument("--samples", type=int, default=RECIPE.diffusion_samples, help="diffusion samples in all")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="single-thread processes")
    parser.add_argument(
        "--only", choices=("diffusion", "decoders", "save"), help="one stage; what it needs must be there"
    )
    options = parser.parse_args()
    recipe = replace(RECIPE, diffusion_samples=options.samples)
    samples_per_s, decoders_h = (110, 0.6) if networks.has_bfloat16() else (37, 1.4)
    cpu_hours = recipe.diffusion_samples / samples_per_s / 3600 + decoders_h
    print(f"about {cpu_hours:.1f} cpu hours on cores of 2024, over {options.workers} processes", flush=True)

    encoder, tokens = prepare(recipe, options.folder, options.workers)
    (options.folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    if options.only in (None, "diffusion"):
        parallel.start(diffusion.train, (recipe, options.folder, tokens), options.folder, options.workers)
    if options.only in (None, "decoders"):
        started = time.monotonic()
        world = decoders.num_processes(recipe, options.workers)
        parallel.start(decoders.train_all, (recipe, options.folder, encoder), options.folder, world)
        print(f"decoders: {time.monotonic() - started:.0f} s", flush=True)
    if options.only in (None, "save"):
        state = checkpoint.load(options.folder / "diffusion.pt")
        if state is None:
            raise SystemExit("no diffusion checkpoint yet")
        save_pipeline(recipe, options.folder, encoder, tokens, state)
        print(f"saved {options.folder / 'pipeline'} after {state['samples']} samples", flush=True)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    main()
