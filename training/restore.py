"""`python -m training.restore`: the shipped pipeline as a diffusers folder again, from its ONNX files and its manifest.

The folder that `icons` was exported from is not in the repository; its weights are, in float16, which the exporter
rounded them to. So everything that starts from a diffusers folder can be done with `icons` too: training an adapter,
exporting it with room for adapters, or for the torch runtime.

The exporter keeps the names of most weights. Weights of linear layers are transposed there, and those of group norms
and position embeddings folded into constants without a name: these are told by the order in which they are used, and
by their sizes. Each network is then compared with its file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from diffusers import StableDiffusionPipeline
from onnx import numpy_helper
from safelight_server.catalog.catalog import load_pipeline
from safelight_server.domain.component import Component
from safelight_server.export.components import Decoder, Denoiser, TextEncoder
from safelight_server.export.onnx_file import check_parity
from torch import Tensor, nn
from transformers import CLIPTokenizer

from training import networks
from training.evaluate import find_manifest
from training.recipe import RECIPE

HALF = ".half"
"""Ends the name of a weight that is stored as float16."""
Values = npt.NDArray[np.float32]


def weights(file: Path) -> dict[str, Values]:
    """The floating-point constants of a network's file by name, in the order in which it uses them."""
    graph = onnx.load(file).graph
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    stored = {
        constant.name.removesuffix(HALF): numpy_helper.to_array(constant).astype(np.float32)
        for constant in graph.initializer
        if constant.data_type in floats
    }
    used = dict.fromkeys(name for node in graph.node for name in node.input if name in stored)
    return {name: stored[name] for name in used}


def executed(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[tuple[str, nn.Parameter, nn.Module]]:
    """The parameters of a module in the order in which a call uses them, each with the layer that it is of."""
    order: list[tuple[str, nn.Parameter, nn.Module]] = []

    def note(name: str, layer: nn.Module) -> None:
        order.extend((f"{name}.{own}", value, layer) for own, value in layer.named_parameters(recurse=False))

    hooks = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name, layer=layer: note(name, layer))
        for name, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    with torch.no_grad():
        module(**inputs)
    for hook in hooks:
        hook.remove()
    return order


def restore(module: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    """Gives a module the weights of the file that it was exported to; `inputs` are an example.

    Raises:
        SystemExit: the file lacks a weight.
        ExportError: the module does not compute what the file computes.
    """
    module.eval()
    found = weights(file)
    order = executed(module, inputs)
    named = {name for name, _, _ in order}
    unnamed: Iterator[Values] = iter([value for name, value in found.items() if name not in named])
    for name, parameter, layer in order:
        value = found.get(name)
        if value is None:
            value = next((one for one in unnamed if one.size == parameter.numel()), None)
            if value is None:
                raise SystemExit(f"{file} has no weights for {name}")
            value = value.T if isinstance(layer, nn.Linear) and value.ndim == 2 else value.reshape(parameter.shape)
        parameter.data = torch.from_numpy(value.copy())
    with torch.no_grad():
        check_parity(module, [inputs], module.outputs, file)


def tokenizer(file: Path, max_tokens: int) -> CLIPTokenizer:
    """CLIP's tokenizer from the file beside the manifest."""
    model = json.loads(file.read_text())["model"]
    start, end = "<|startoftext|>", "<|endoftext|>"
    made = CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token=end,
    )
    made.model_max_length = max_tokens
    return made


def restore_pipeline(manifest: Path, folder: Path) -> None:
    """Writes the pipeline of a manifest, `models/pipelines/icons/REVISION/pipeline.json`, as `save.py` does."""
    files = load_pipeline(manifest, manifest.parents[3] / "repository").files
    said = json.loads(manifest.read_text())
    networks.seed_everything(RECIPE.seed)
    tokens = tokenizer(manifest.parent / said["tokenizer"]["file"], said["tokenizer"]["max_tokens"])
    text, unet = networks.text_encoder(RECIPE, tokens), networks.denoiser(RECIPE)
    decoder = networks.autoencoder(RECIPE, RECIPE.decoder_channels, RECIPE.decoder_blocks)
    preview = networks.autoencoder(RECIPE, RECIPE.preview_channels, RECIPE.preview_blocks)

    latent = torch.randn(2, RECIPE.latent_channels, RECIPE.latent_px, RECIPE.latent_px)
    ids = tokens(["a red potion", ""], padding="max_length", return_tensors="pt").input_ids
    restore(TextEncoder(text), {"input_ids": ids}, files[Component.TEXT_ENCODER])
    with torch.no_grad():
        states = text(input_ids=ids).last_hidden_state
    inputs = {"sample": latent, "timestep": torch.tensor([999.0, 12.0]), "encoder_hidden_states": states}
    restore(Denoiser(unet), inputs, files[Component.DENOISER])
    for autoencoder, component in ((decoder, Component.DECODER), (preview, Component.PREVIEW_DECODER)):
        restore(Decoder(autoencoder), {"latent": latent / RECIPE.scaling_factor}, files[component])

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    StableDiffusionPipeline(
        vae=decoder,
        text_encoder=text,
        tokenizer=tokens,
        unet=unet,
        scheduler=networks.noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(partial)
    preview.save_pretrained(partial / "preview_decoder")
    encoder = weights(files[Component.ENCODER])
    np.savez(partial / "encoder.npz", weight=encoder["patches.weight"], bias=encoder["patches.bias"])
    linear = {name: np.array(said["linear_preview"][name], np.float32) for name in ("weights", "bias")}
    np.savez(partial / "linear_preview.npz", **linear)
    prompts = {name: said[name] for name in ("guard", "example_prompts")}
    (partial / "prompts.json").write_text(json.dumps(prompts, indent=1))
    shutil.copy(manifest.parent / "training.json", partial / "training.json")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="where pipelines/ is")
    parser.add_argument("--revision", help="of icons; without it the newest")
    parser.add_argument("--out", type=Path, default=Path("out/restored/icons"), help="the diffusers folder")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    restore_pipeline(find_manifest(options.models, "icons", options.revision), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
