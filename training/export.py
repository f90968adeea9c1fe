"""`python -m training.export FOLDER`: a diffusers folder becomes a Triton model repository and a pipeline manifest.

For any `StableDiffusionPipeline` of CLIPTextModel, UNet2DConditionModel and
AutoencoderTiny or AutoencoderKL. Weights are stored as float16 and cast at
load; the arithmetic is float32. The same folder gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor, nn

from training.components import Decoder, Denoiser, TextEncoder, decoder_of
from training.onnx_file import check_parity, sha256, write_onnx
from training.repository import write_config

MAX_ROWS = {"text_encoder": 16, "denoiser": 64, "decoder": 16, "preview_decoder": 16}
PREVIEW_BLOCK = 4
PREVIEW_LATENTS = 512


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a diffusers StableDiffusionPipeline folder")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where repository/ and pipelines/ are")
    parser.add_argument("--name", default="icons", help="of the pipeline; components are NAME_denoiser, …")
    parser.add_argument("--revision", required=True, help="of the weights")
    parser.add_argument("--version", type=int, default=1, help="Triton's version folder")
    parser.add_argument("--description", default="Game item icons from plain words")
    parser.add_argument("--license", default="Apache-2.0", help="SPDX identifier of the weights")
    options = parser.parse_args()
    torch.manual_seed(0)
    export(**vars(options))


@torch.no_grad()
def export(folder: Path, models: Path, name: str, revision: str, version: int, description: str, license: str) -> None:
    """Writes the components, then the manifest that binds them."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    components = _components(pipeline, folder)
    inputs = _example_inputs(pipeline)
    manifest_components = {}
    for role, module in components.items():
        _round_weights(module)
        model = f"{name}_{role}"
        target = models / "repository" / model / str(version) / "model.onnx"
        write_onnx(module.eval(), inputs[role], module.outputs, target)
        worst = check_parity(module, inputs[role], module.outputs, target)
        write_config(target.parent.parent / "config.pbtxt", model, MAX_ROWS[role], inputs[role], module)
        manifest_components[role] = {"model": model, "version": version, "sha256": sha256(target)}
        print(f"{model}: {target.stat().st_size / 2**20:.2f} MiB, off by at most {worst:.1e}")
    place = models / "pipelines" / name / revision
    place.mkdir(parents=True, exist_ok=True)
    pipeline.tokenizer._tokenizer.save(str(place / "tokenizer.json"))
    manifest = _manifest(pipeline, folder, components["decoder"], place)
    manifest |= {"name": name, "revision": revision, "description": description, "license": license}
    manifest["components"] = manifest_components
    ordered = {key: manifest[key] for key in MANIFEST_KEYS}
    (place / "pipeline.json").write_text(_readable(ordered))
    if (folder / "training.json").exists():
        shutil.copy(folder / "training.json", place / "training.json")


MANIFEST_KEYS = (
    "format", "name", "revision", "description", "license", "family", "components", "tokenizer", "latent", "sizes",
    "prediction_type", "noise_schedule", "samplers", "defaults", "limits", "linear_preview",
)  # fmt: skip


def _components(pipeline: StableDiffusionPipeline, folder: Path) -> dict[str, nn.Module]:
    components: dict[str, nn.Module] = {
        "text_encoder": TextEncoder(pipeline.text_encoder),
        "denoiser": Denoiser(pipeline.unet),
        "decoder": decoder_of(pipeline.vae),
    }
    if (folder / "preview_decoder").exists():
        components["preview_decoder"] = Decoder(AutoencoderTiny.from_pretrained(folder / "preview_decoder"))
    return components


def _latent_shape(pipeline: StableDiffusionPipeline) -> tuple[int, int, int]:
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipeline.unet.config.in_channels, height, width


def _example_inputs(pipeline: StableDiffusionPipeline) -> dict[str, Mapping[str, Tensor]]:
    channels, height, width = _latent_shape(pipeline)
    tokens, text_width = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size
    rows = 2
    latent = {"latent": torch.randn(rows, channels, height, width) / pipeline.vae.config.scaling_factor}
    vocabulary = pipeline.text_encoder.config.vocab_size
    return {
        "text_encoder": {"input_ids": torch.randint(0, vocabulary, (rows, tokens), dtype=torch.int64)},
        "denoiser": {
            "sample": torch.randn(rows, channels, height, width),
            "timestep": torch.tensor([999.0, 12.0]),
            "encoder_hidden_states": torch.randn(rows, tokens, text_width),
        },
        "decoder": latent,
        "preview_decoder": latent,
    }


def _round_weights(module: nn.Module) -> None:
    """To what float16 can hold: exported and reference weights are then the same numbers."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().float()


def _manifest(pipeline: StableDiffusionPipeline, folder: Path, decoder: nn.Module, place: Path) -> dict[str, object]:
    channels, height, width = _latent_shape(pipeline)
    schedule, vae, tokenizer = pipeline.scheduler.config, pipeline.vae.config, pipeline.tokenizer
    scale = pipeline.vae_scale_factor
    zero_snr, prediction = schedule.rescale_betas_zero_snr, schedule.prediction_type
    trailing = {"spacings": ["trailing"], "sigma_schedules": ["default"]}
    samplers = ["ddim", "euler", "euler_ancestral", "dpmpp_2m"]
    return {
        "format": 1,
        "family": "stable-diffusion",
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": sha256(place / "tokenizer.json"),
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
        "prediction_type": prediction,
        "noise_schedule": {
            "beta_schedule": schedule.beta_schedule,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "num_train_timesteps": schedule.num_train_timesteps,
            "rescale_zero_terminal_snr": zero_snr,
            "steps_offset": schedule.steps_offset,
            "set_alpha_to_one": schedule.set_alpha_to_one,
        },
        "samplers": [{"name": sampler, **trailing} for sampler in samplers],
        "defaults": {
            "num_inference_steps": 20,
            "guidance_scale": 3.0,
            "sampler": {
                "name": "ddim",
                "spacing": schedule.timestep_spacing,
                "sigma_schedule": "default",
                "eta": 0.0,
            },
        },
        "limits": {"max_num_inference_steps": 50, "max_guidance_scale": 20.0, "max_outputs": 8},
        "linear_preview": _linear_preview(pipeline, folder, decoder),
    }


def _linear_preview(pipeline: StableDiffusionPipeline, folder: Path, decoder: nn.Module) -> dict[str, object]:
    """From `linear_preview.npz`, else fitted to what the decoder makes of random latents."""
    given = folder / "linear_preview.npz"
    if given.exists():
        with np.load(given) as arrays:
            weights, bias = arrays["weights"], arrays["bias"]
    else:
        weights, bias = _fit_linear(pipeline, decoder)
    block = round((weights.shape[1] / 3) ** 0.5)
    rounded = np.round(weights.astype(float), 5), np.round(bias.astype(float), 5)
    return {"block": block, "weights": rounded[0].tolist(), "bias": rounded[1].tolist()}


def _fit_linear(pipeline: StableDiffusionPipeline, decoder: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    channels, height, width = _latent_shape(pipeline)
    latents = torch.randn(PREVIEW_LATENTS, channels, 1, 1) + 0.3 * torch.randn(PREVIEW_LATENTS, channels, height, width)
    shift = getattr(pipeline.vae.config, "shift_factor", None) or 0.0
    images = torch.cat([decoder(part / pipeline.vae.config.scaling_factor + shift) for part in latents.split(16)])
    small = nn.functional.interpolate(images.clamp(-1, 1), size=(height, width), mode="area")
    rows = latents.permute(0, 2, 3, 1).reshape(-1, channels)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, small.permute(0, 2, 3, 1).reshape(-1, 3)).solution.numpy()
    return solution[:-1], solution[-1]


def _readable(manifest: Mapping[str, object]) -> str:
    """JSON with one line per row of numbers."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    lines: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        number = bare.rstrip(",").lstrip("-").replace(".", "").replace("e-", "").isdigit()
        closes = bare.startswith("]") and lines and lines[-1].endswith("\x00")
        if number or closes:
            lines[-1] = lines[-1].rstrip("\x00") + (
                bare if closes or lines[-1].rstrip("\x00").endswith("[") else " " + bare
            )
            lines[-1] += "" if closes else "\x00"
        else:
            lines.append(line)
    return "\n".join(lines).replace("\x00", "") + "\n"


if __name__ == "__main__":
    main()
