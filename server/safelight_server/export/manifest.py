"""Makes the manifest pipeline.json from the configuration of a diffusers pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from torch import nn

from safelight_server.export.onnx_file import sha256

DEFAULT_SAMPLERS = {
    DDIMScheduler: "ddim",
    DPMSolverMultistepScheduler: "dpmpp_2m",
    EulerAncestralDiscreteScheduler: "euler_ancestral",
    LCMScheduler: "lcm",
}
"""Which sampler stands for the scheduler that a folder was saved with; Euler where it is none of these."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FIT_LATENTS = 512
FIT_EDGE = 8
"""The linear preview is fitted on this many latents of at most this edge."""


def latent_shape(pipeline: StableDiffusionPipeline) -> tuple[int, int, int]:
    """(C, h, w) at the pipeline's own size."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipeline.unet.config.in_channels, height, width


def noise_schedule(pipeline: StableDiffusionPipeline) -> dict[str, object]:
    """How the training data was noised. Keys that a scheduler class does not know have Stable Diffusion's values.

    Raises:
        SystemExit: no sampler of the server knows such a schedule.
    """
    config = pipeline.scheduler.config
    if config.get("trained_betas") is not None or config.beta_schedule not in BETA_SCHEDULES:
        raise SystemExit(f"no sampler for beta_schedule {config.beta_schedule}; {', '.join(BETA_SCHEDULES)} are known")
    return {
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "num_train_timesteps": config.num_train_timesteps,
        "rescale_zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "steps_offset": config.get("steps_offset", 0),
        "set_alpha_to_one": config.get("set_alpha_to_one", True),
    }


def prediction_type(pipeline: StableDiffusionPipeline) -> str:
    """What the denoiser predicts."""
    found: str = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if found not in PREDICTIONS:
        raise SystemExit(f"no sampler for prediction_type {found}; {', '.join(PREDICTIONS)} are known")
    return found


def samplers(zero_terminal_snr: bool) -> list[dict[str, Any]]:
    """What can be offered: a pipeline of zero terminal SNR starts at its last timestep, so only trailing will do."""
    if zero_terminal_snr:
        cells: dict[str, tuple[str, ...]] = {
            name: ("default",) for name in ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
        }
        spacings = ["trailing"]
    else:
        both = ("default", "karras")
        cells = {"euler": both, "euler_ancestral": ("default",), "ddim": ("default",), "dpmpp_2m": both}
        spacings = ["leading", "trailing", "linspace"]
    return [{"name": name, "spacings": spacings, "sigma_schedules": list(sigmas)} for name, sigmas in cells.items()]


def default_sampler(pipeline: StableDiffusionPipeline, offered: list[dict[str, Any]]) -> dict[str, object]:
    """What the folder was saved with, where it is offered, else the nearest that is."""
    wanted = DEFAULT_SAMPLERS.get(type(pipeline.scheduler), "euler")
    cells = next((cell for cell in offered if cell["name"] == wanted), offered[0])
    spacing = pipeline.scheduler.config.get("timestep_spacing", "leading")
    spacings, sigmas = cells["spacings"], cells["sigma_schedules"]
    karras = pipeline.scheduler.config.get("use_karras_sigmas", False) and "karras" in sigmas
    return {
        "name": cells["name"],
        "spacing": spacing if spacing in spacings else spacings[0],
        "sigma_schedule": "karras" if karras else "default",
        "eta": 0.0,
    }


def describe(
    pipeline: StableDiffusionPipeline, tokens: Path, preview: Mapping[str, object], steps: int, guidance_scale: float
) -> dict[str, object]:
    """The part of pipeline.json that follows from the pipeline; `tokens` is the tokenizer's file."""
    channels, height, width = latent_shape(pipeline)
    schedule, vae, tokenizer = noise_schedule(pipeline), pipeline.vae.config, pipeline.tokenizer
    scale = pipeline.vae_scale_factor
    offered = samplers(bool(schedule["rescale_zero_terminal_snr"]))
    return {
        "tokenizer": {
            "file": tokens.name,
            "sha256": sha256(tokens),
            "max_tokens": tokenizer.model_max_length,
            "pad_id": tokenizer.pad_token_id,
            "bos_id": tokenizer.bos_token_id,
            "eos_id": tokenizer.eos_token_id,
        },
        "latent": {
            "channels": channels,
            "height": height,
            "width": width,
            "scaling_factor": vae.scaling_factor,
            "shift_factor": getattr(vae, "shift_factor", None) or 0.0,
        },
        "sizes": [{"width_px": width * scale, "height_px": height * scale}],
        "prediction_type": prediction_type(pipeline),
        "noise_schedule": schedule,
        "samplers": offered,
        "defaults": {
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "sampler": default_sampler(pipeline, offered),
        },
        "limits": {"max_num_inference_steps": max(50, steps), "max_guidance_scale": 20.0, "max_outputs": 8},
        "linear_preview": preview,
    }


def linear_preview(pipeline: StableDiffusionPipeline, given: Path, decoder: nn.Module) -> dict[str, object]:
    """From `given`, an npz of weights (C, 3 * k * k) and bias, else fitted to what the decoder makes of latents."""
    if given.exists():
        with np.load(given) as arrays:
            weights, bias = arrays["weights"], arrays["bias"]
    else:
        weights, bias = _fit_linear(pipeline, decoder)
    block = round((weights.shape[1] / 3) ** 0.5)
    if weights.shape != (pipeline.unet.config.in_channels, 3 * block**2) or bias.shape != (3 * block**2,):
        raise SystemExit(f"{given}: weights {weights.shape} and bias {bias.shape} are not C x 3kk and 3kk")
    rounded = np.round(weights.astype(float), 5), np.round(bias.astype(float), 5)
    return {"block": block, "weights": rounded[0].tolist(), "bias": rounded[1].tolist()}


@torch.no_grad()
def _fit_linear(pipeline: StableDiffusionPipeline, decoder: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Least squares, one RGB value a latent pixel, on random latents that are alike in a neighbourhood."""
    channels, height, width = latent_shape(pipeline)
    height, width = min(height, FIT_EDGE), min(width, FIT_EDGE)
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(FIT_LATENTS, channels, 1, 1, generator=generator)
    latents = level + 0.3 * torch.randn(FIT_LATENTS, channels, height, width, generator=generator)
    vae = pipeline.vae.config
    shift = getattr(vae, "shift_factor", None) or 0.0
    images = torch.cat([decoder(part / vae.scaling_factor + shift) for part in latents.split(16)])
    small = nn.functional.interpolate(images.clamp(-1, 1), size=(height, width), mode="area")
    rows = latents.permute(0, 2, 3, 1).reshape(-1, channels)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, small.permute(0, 2, 3, 1).reshape(-1, 3)).solution.numpy()
    return solution[:-1], solution[-1]


def prompts(given: Path) -> dict[str, object]:
    """What a folder knows of its prompts, for the approximate caches: `guard` and `example_prompts`, or nothing."""
    found: dict[str, object] = json.loads(given.read_text()) if given.exists() else {}
    return {key: found[key] for key in ("guard", "example_prompts") if key in found}


def readable(manifest: Mapping[str, object]) -> str:
    """JSON with one line per row of numbers."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    rows = re.compile(r"\[\s+(-?\d[^\[\]{}\"]*?)\s+\]")
    return rows.sub(lambda row: "[" + re.sub(r"\s+", " ", row[1]) + "]", text) + "\n"
