"""Exports a diffusers folder as a Triton model repository and a pipeline manifest.

`python -m safelight_server.export.exporter FOLDER` does it.

For any `StableDiffusionPipeline` of CLIPTextModel, UNet2DConditionModel and
AutoencoderTiny or AutoencoderKL; a folder `preview_decoder/` (AutoencoderTiny)
and the files `encoder.npz` (a linear encoder in place of the autoencoder's own),
`linear_preview.npz` and `prompts.json` beside them are used where they are there.
Weights are stored as float16 and cast at load; the arithmetic is float32. The
same folder gives the same bytes. Nothing in `--models` changes before every
component was written and found equal to its torch module.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from safelight_server.export import manifest
from safelight_server.export.components import Decoder, Denoiser, Encoder, PatchEncoder, TextEncoder, decoder_of
from safelight_server.export.onnx_file import check_parity, sha256, write_onnx
from safelight_server.export.repository import write_config

MAX_ROWS = {"text_encoder": 16, "denoiser": 64, "decoder": 16, "preview_decoder": 16, "encoder": 16}
KNOWN = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a diffusers StableDiffusionPipeline folder")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where repository/ and pipelines/ are")
    parser.add_argument("--name", default="icons", help="of the pipeline; components are NAME_denoiser, …")
    parser.add_argument("--revision", required=True, help="of the weights")
    parser.add_argument("--version", type=int, default=1, help="Triton's version folder")
    parser.add_argument("--replace", action="store_true", help="remove all other revisions of NAME")
    parser.add_argument("--description", default="Game item icons from plain words")
    parser.add_argument("--license", default="Apache-2.0", help="SPDX identifier of the weights")
    parser.add_argument("--steps", type=int, default=20, help="default num_inference_steps")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="default guidance_scale")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|copyreg")
    export(**vars(parser.parse_args()))


@torch.no_grad()
def export(
    folder: Path,
    models: Path,
    name: str,
    revision: str,
    version: int = 1,
    replace: bool = False,
    description: str = "",
    license: str = "Apache-2.0",
    steps: int = 20,
    guidance_scale: float = 3.0,
) -> None:
    """Writes the components, then the manifest that binds them.

    Raises:
        SystemExit: the folder cannot be exported, ONNX Runtime does not agree with torch, or another revision uses
            the files that would be overwritten.
    """
    pipeline = load(folder)
    components = _components(pipeline, folder)
    if not replace:
        _refuse_to_break(models, name, revision, {f"{name}_{role}" for role in components}, version)
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".export-") as scratch:
        staged = Path(scratch)
        bound = {
            role: _export_component(role, module, pipeline, staged / "repository" / f"{name}_{role}", version)
            for role, module in components.items()
        }
        place = staged / "pipeline"
        place.mkdir()
        pipeline.tokenizer._tokenizer.save(str(place / "tokenizer.json"))
        preview = manifest.linear_preview(pipeline, folder / "linear_preview.npz", components["decoder"])
        whole = {
            "format": 1,
            "name": name,
            "revision": revision,
            "description": description,
            "license": license,
            "family": "stable-diffusion",
            "components": bound,
            **manifest.describe(pipeline, place / "tokenizer.json", preview, steps, guidance_scale),
            **manifest.prompts(folder / "prompts.json"),
        }
        (place / "pipeline.json").write_text(manifest.readable(whole))
        if (folder / "training.json").exists():
            shutil.copy(folder / "training.json", place / "training.json")
        _install(staged, models, name, revision, replace)


def load(folder: Path) -> StableDiffusionPipeline:
    """The pipeline, on the CPU in float32."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise SystemExit(f"{folder} is no diffusers folder: it has no model_index.json")
    found = json.loads(index.read_text()).get("_class_name")
    if found != "StableDiffusionPipeline":
        raise SystemExit(f"{folder} is a {found}; a StableDiffusionPipeline is what can be exported")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} cannot be read: {str(error).splitlines()[0]}") from None
    for role, wanted in KNOWN.items():
        if not isinstance(getattr(pipeline, role), wanted):
            raise SystemExit(f"{folder}: {role} is a {type(getattr(pipeline, role)).__name__}, not a {wanted.__name__}")
    return pipeline


def _components(pipeline: StableDiffusionPipeline, folder: Path) -> dict[str, nn.Module]:
    components: dict[str, nn.Module] = {
        "text_encoder": TextEncoder(pipeline.text_encoder),
        "denoiser": Denoiser(pipeline.unet),
        "decoder": decoder_of(pipeline.vae),
    }
    if (folder / "preview_decoder").exists():
        preview = AutoencoderTiny.from_pretrained(folder / "preview_decoder", local_files_only=True)
        scale = pipeline.vae.config.scaling_factor / preview.config.scaling_factor
        components["preview_decoder"] = Decoder(preview, scale)
    components["encoder"] = _encoder(pipeline, folder / "encoder.npz")
    return components


def _encoder(pipeline: StableDiffusionPipeline, given: Path) -> nn.Module:
    """The linear encoder of `given`, an npz of weight (C, 3, p, p) and bias (C,), else the autoencoder's."""
    if not given.exists():
        return Encoder(pipeline.vae)
    with np.load(given) as arrays:
        return PatchEncoder(torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"]))


def _export_component(
    role: str, module: nn.Module, pipeline: StableDiffusionPipeline, place: Path, version: int
) -> dict[str, object]:
    """Writes one component below `place`; returns what the manifest says of it."""
    round_weights(module.eval())
    inputs, target = _example_inputs(role, pipeline), place / str(version) / "model.onnx"
    write_onnx(module, inputs, module.outputs, target)
    worst = check_parity(module, inputs, module.outputs, target)
    write_config(place / "config.pbtxt", place.name, MAX_ROWS[role], inputs, module)
    print(f"{place.name}: {target.stat().st_size / 2**20:.2f} MiB, off by at most {worst:.1e}", flush=True)
    return {"model": place.name, "version": version, "sha256": sha256(target)}


def _example_inputs(role: str, pipeline: StableDiffusionPipeline) -> Mapping[str, Tensor]:
    """Two rows of what a component is given."""
    channels, height, width = manifest.latent_shape(pipeline)
    tokens, text = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config
    generator, rows = torch.Generator().manual_seed(0), 2
    latent = torch.randn(rows, channels, height, width, generator=generator)
    if role == "text_encoder":
        return {"input_ids": torch.randint(0, text.vocab_size, (rows, tokens), generator=generator)}
    if role == "denoiser":
        context = torch.randn(rows, tokens, text.hidden_size, generator=generator)
        return {"sample": latent, "timestep": torch.tensor([999.0, 12.0]), "encoder_hidden_states": context}
    if role == "encoder":
        scale = pipeline.vae_scale_factor
        return {"image": torch.rand(rows, 3, height * scale, width * scale, generator=generator) * 2 - 1}
    return {"latent": latent / pipeline.vae.config.scaling_factor}


def round_weights(module: nn.Module) -> None:
    """To what float16 can hold: exported and reference weights are then the same numbers."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            half = tensor.data.half()
            if not half.isfinite().all():
                raise SystemExit(f"{name} has values that float16 cannot hold")
            tensor.data = half.float()


def _refuse_to_break(models: Path, name: str, revision: str, overwritten: set[str], version: int) -> None:
    """Other revisions must keep the files that they name."""
    for path in sorted(models.glob(f"pipelines/{name}/*/pipeline.json")):
        used = json.loads(path.read_text())["components"].values()
        if path.parent.name != revision and any(c["model"] in overwritten and c["version"] == version for c in used):
            raise SystemExit(f"{path} uses the files that would be overwritten: --replace removes that revision")


def _install(staged: Path, models: Path, name: str, revision: str, replace: bool) -> None:
    """Moves everything to its place, the manifest last; no manifest ever names files that are not its own."""
    repository, pipelines = models / "repository", models / "pipelines" / name
    shutil.rmtree(pipelines if replace else pipelines / revision, ignore_errors=True)
    for role in MAX_ROWS if replace else ():
        shutil.rmtree(repository / f"{name}_{role}", ignore_errors=True)
    for component in sorted((staged / "repository").iterdir()):
        for item in component.iterdir():
            target = repository / component.name / item.name
            if target.is_dir():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            item.replace(target)
    pipelines.mkdir(parents=True, exist_ok=True)
    (staged / "pipeline").replace(pipelines / revision)


if __name__ == "__main__":
    main()
