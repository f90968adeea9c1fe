"""Judges an IP-Adapter before it is loaded: which kind it is, and whether it fits the UNet and the image encoder.

A folder is laid out as diffusers' `load_ip_adapter` expects it: the weights in
safetensors, and `image_encoder/`, a CLIPVisionModelWithProjection, beside them.
Does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight_server.export import networks, weights
from safelight_server.export.source import Findings, Source, read_json

OPTION = "--image-prompt"
IMAGE_ENCODER = "image_encoder"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
BASE_TOKENS = 4
"""Tokens that the base IP-Adapter makes of a picture (Ye et al. 2023, section 3.2), as diffusers counts them."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ImagePromptSource:
    """An IP-Adapter that can be exported.

    Attributes:
        weights: its file.
        encoder: the folder of its image encoder.
        edge_px: edge of the square that the image encoder takes.
        num_tokens: tokens that it makes of a picture.
        width: of a token.
        num_values: numbers in its weights, and in those of the image encoder.
    """

    weights: Path
    encoder: Path
    edge_px: int
    num_tokens: int
    width: int
    num_values: int

    @property
    def room(self) -> dict[str, int]:
        """What the manifest says of it (`ImagePromptRoom`)."""
        return {"edge_px": self.edge_px, "num_tokens": self.num_tokens, "width": self.width}


def judge(given: Path, source: Source, findings: Findings) -> ImagePromptSource | None:
    """Judges an IP-Adapter for the UNet of `source`; what is wrong goes to `findings`, and then there may be none.

    Args:
        given: its file of weights, or the folder with that file alone.
    """
    file = _file(given, findings)
    if file is None:
        return None
    fault, num_values = weights.check(file)
    if fault:
        findings.faults.append(f"{OPTION} {file.name} {fault}")
        return None
    shapes = _shapes(file)
    folder = file.parent / IMAGE_ENCODER
    if not (folder / "config.json").is_file():
        findings.faults.append(
            f"{OPTION} {file}: {IMAGE_ENCODER}/ is missing beside it: the folder of a CLIPVisionModelWithProjection"
        )
        return None
    config = read_json(folder / "config.json")
    networks.judge_image_encoder(f"{IMAGE_ENCODER}/config.json", config, findings)
    found = weights.find(folder, "", findings)
    made = _kind(file.name, shapes, findings)
    if made is None:
        return None
    num_tokens, width, input_width, reads = made
    expected = source.configs["unet"].get("cross_attention_dim", 1280)
    if width != expected:
        findings.faults.append(
            f"{OPTION} {file.name}: its tokens have {width} numbers, and the UNet's cross_attention_dim is {expected}:"
            " it belongs to another base model"
        )
    if input_width != config.get(reads, networks.VISION_DEFAULTS[reads]):
        findings.faults.append(
            f"{OPTION} {file.name}: it takes {input_width} numbers, and the {reads} of {IMAGE_ENCODER}/ is"
            f" {config.get(reads, networks.VISION_DEFAULTS[reads])}: it belongs to another image encoder"
        )
    edge = config.get("image_size", networks.VISION_DEFAULTS["image_size"])
    if not isinstance(edge, int):  # judged above
        return None
    return ImagePromptSource(file, folder, edge, num_tokens, width, num_values + found.num_values)


def _file(given: Path, findings: Findings) -> Path | None:
    if given.is_dir():
        found = sorted(given.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            findings.faults.append(
                f"{OPTION} {given}: has several: {', '.join(file.name for file in found)}; name one of the files"
            )
            return None
        pickled = sorted(file.name for file in given.glob("*") if file.suffix in PICKLES)
        why = f"; {pickled[0]} is a pickle, which can run code when it is read" if pickled else ""
        findings.faults.append(f"{OPTION} {given}: has no .safetensors file{why}")
        return None
    if given.suffix in PICKLES:
        findings.faults.append(
            f"{OPTION} {given}: is a pickle, which can run code when it is read: give the .safetensors file"
        )
        return None
    if not given.is_file():
        findings.faults.append(f"{OPTION} {given}: there is no such file or folder")
        return None
    return given


def _shapes(file: Path) -> dict[str, Shape]:
    """The shape of each tensor of a safetensors file that `weights.check` has accepted."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _kind(name: str, shapes: Mapping[str, Shape], findings: Findings) -> tuple[int, int, int, str] | None:
    """Number and width of its tokens, the width of what it takes, and the encoder's key that this width must be."""
    if not any(key.startswith("ip_adapter.") for key in shapes):
        findings.faults.append(f"{OPTION} {name}: is no IP-Adapter: it has no weights ip_adapter.…")
        return None
    kinds = {
        "image_proj.proj.3.weight": "IP-Adapter Full",
        "image_proj.perceiver_resampler.proj_in.weight": "IP-Adapter FaceID Plus",
        "image_proj.proj.0.weight": "IP-Adapter FaceID",
    }
    projection, latents = shapes.get("image_proj.proj.weight"), shapes.get("image_proj.latents")
    if projection is not None and len(projection) == 2:
        return BASE_TOKENS, projection[0] // BASE_TOKENS, projection[1], "projection_dim"
    taken, given = shapes.get("image_proj.proj_in.weight"), shapes.get("image_proj.proj_out.weight")
    if latents is not None and taken is not None and given is not None and len(latents) == 3:
        return latents[1], given[0], taken[1], "hidden_size"
    what = next((kind for key, kind in kinds.items() if key in shapes), "of a kind that is not known")
    findings.faults.append(f"{OPTION} {name}: is {what}; the base IP-Adapter and IP-Adapter Plus can be exported")
    return None
