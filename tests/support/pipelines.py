"""A small pipeline for tests that need a manifest and a real tokenizer, but no networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.manifest import (
    ADAPTER_INPUTS,
    CONTROL_INPUTS,
    AdapterRoom,
    Manifest,
)
from safelight_server.catalog.pipeline import Pipeline, assemble
from safelight_server.catalog.tokenizer import Tokenizer
from tokenizers import models, pre_tokenizers

from tests.support import image_prompts
from tests.support.adapters import ROOM, write_adapter

PAD, BOS, EOS = 0, 1, 2
MAX_TOKENS = 8
WORDS = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": 3, "red": 4, "blue": 5, "potion": 6, "sword": 7}

MANIFEST: dict[str, Any] = {
    "format": 1,
    "name": "small",
    "revision": "r1",
    "description": "For tests",
    "license": "Apache-2.0",
    "family": "stable-diffusion",
    "components": {
        role: {"model": f"small_{role}", "version": 1, "sha256": "0" * 64}
        for role in ("text_encoder", "denoiser", "decoder", "encoder")
    },
    "tokenizer": {
        "file": "tokenizer.json",
        "sha256": "0" * 64,
        "max_tokens": MAX_TOKENS,
        "pad_id": PAD,
        "bos_id": BOS,
        "eos_id": EOS,
    },
    "latent": {"channels": 4, "height": 8, "width": 8, "scaling_factor": 1.0},
    "sizes": [{"width_px": 64, "height_px": 64}, {"width_px": 64, "height_px": 96}],
    "prediction_type": "v_prediction",
    "noise_schedule": {"rescale_zero_terminal_snr": True},
    "samplers": [
        {"name": "ddim", "spacings": ["trailing", "leading"], "sigma_schedules": ["default"]},
        {"name": "euler", "spacings": ["trailing"], "sigma_schedules": ["default", "karras"]},
        {"name": "dpmpp_2m", "spacings": ["trailing"], "sigma_schedules": ["default", "karras"]},
    ],
    "defaults": {
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "sampler": {"name": "ddim", "spacing": "trailing", "sigma_schedule": "default", "eta": 0.0},
    },
    "limits": {"max_num_inference_steps": 50, "max_guidance_scale": 20.0, "max_outputs": 4},
    "linear_preview": {"block": 1, "weights": [[1.0, 0.0, 0.0]] * 4, "bias": [0.0, 0.0, 0.0]},
}


def small_pipeline(folder: Path, **changes: Any) -> Pipeline:
    """A pipeline whose tokenizer is written to `folder`; `changes` replace top-level entries of its manifest."""
    file = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(file))
    manifest = Manifest.model_validate(MANIFEST | changes)
    return assemble(manifest, {}, Tokenizer(file, MAX_TOKENS, PAD, BOS, EOS))


def small_catalog(folder: Path, **changes: Any) -> Catalog:
    """A catalog with `small_pipeline` only."""
    return Catalog([small_pipeline(folder, **changes)])


def adapted_catalog(folder: Path, *adapters: str) -> Catalog:
    """A catalog with these adapters of rank 2, whose pipeline allows a sum of ranks up to 6.

    It has the control networks `edges` and `depth`, and takes image prompts, too.
    """
    inputs = image_prompts.INPUTS | ADAPTER_INPUTS | CONTROL_INPUTS
    components = MANIFEST["components"] | image_prompts.IMAGE_ENCODER
    room = {"adapters": ROOM, "controls": ["edges", "depth"], "image_prompt": image_prompts.ROOM}
    catalog = small_catalog(folder, inputs=inputs, components=components, **room)
    for seed, name in enumerate(adapters):
        write_adapter(folder / "adapters", name, seed=seed)
    catalog.adapters = AdapterLibrary(folder / "adapters", {"small": AdapterRoom.model_validate(ROOM)})
    return catalog
