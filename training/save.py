"""Saves the trained model as a standard `StableDiffusionPipeline` folder, with the preview decoders beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from transformers import CLIPTokenizer

from training import checkpoint, diffusion, networks
from training.icons import prompts
from training.latents import Projection
from training.recipe import Recipe


def save_pipeline(
    recipe: Recipe, folder: Path, encoder: Projection, tokens: CLIPTokenizer, state: dict[str, object]
) -> None:
    """Saves the averaged weights at `state`, with the newest decoders, to `folder / "pipeline"`."""
    model = diffusion.build(recipe, tokens)
    model.load_state_dict(state["average"])
    pipeline = StableDiffusionPipeline(
        vae=_decoder(folder, "decoder", networks.autoencoder(recipe, recipe.decoder_channels, recipe.decoder_blocks)),
        text_encoder=model.text.eval(),
        tokenizer=tokens,
        unet=model.unet.eval(),
        scheduler=networks.noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    target, partial = folder / "pipeline", folder / "pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    preview = networks.autoencoder(recipe, recipe.preview_channels, recipe.preview_blocks)
    _decoder(folder, "preview_decoder", preview).save_pretrained(partial / "preview_decoder")
    weight, bias = encoder.convolution(recipe.scaling_factor)
    np.savez(partial / "encoder.npz", weight=weight, bias=bias)
    weights, bias = encoder.linear_preview(recipe.linear_block)
    np.savez(partial / "linear_preview.npz", weights=weights, bias=bias)
    (partial / "prompts.json").write_text(json.dumps(prompts.about(), indent=1))
    facts = {
        "samples": state["samples"],
        "diffusion_cpu_s": round(state["cpu_s"]),
        "psnr_db": json.loads((folder / "decoders.json").read_text()),
    }
    (partial / "training.json").write_text(json.dumps(facts, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _decoder(folder: Path, name: str, model: AutoencoderTiny) -> AutoencoderTiny:
    state = checkpoint.load(folder / f"{name}.pt")
    if state is None:
        raise SystemExit(f"no {name} yet: train the decoders first")
    model.decoder.load_state_dict(state["decoder"])
    return model.eval()
