"""Reads the configurations of a diffusers folder, without torch and without its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight_server.catalog.manifest import (
    STABLE_DIFFUSION_INPUTS,
    STABLE_DIFFUSION_XL_INPUTS,
    TRANSFORMER_INPUTS,
    Z_IMAGE_INPUTS,
)

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of pipelines that can be exported.

    Attributes:
        name: as in the manifest.
        components: by name in model_index.json the classes that can be exported.
        inputs: of the denoiser, each with its source, as in the manifest.
        guidance_scale: default of requests.
        mends_scheduler: whether the pipeline's classes set steps_offset to 1, and the one that does not inpaint
            clip_sample to False, whatever the scheduler's file says.
        denoiser: the name of its denoiser.
        steps: default number of steps of requests, of models that are not distilled.
        spacing: of the steps, where the family decides it and not the scheduler's file.
        distilled_steps: likewise, of distilled models.
        max_tokens: longest context of its last text encoder, where that is not CLIP; 0: it is CLIP.
        is_torch_alone: whether its denoiser cannot be written as ONNX.
    """

    name: str
    components: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, str]
    guidance_scale: float
    mends_scheduler: bool = False
    denoiser: str = "unet"
    steps: int = 20
    spacing: str = ""
    distilled_steps: int = 4
    max_tokens: int = 0
    is_torch_alone: bool = False

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The names of the text encoders."""
        return tuple(name for name in self.components if name.startswith("text_encoder"))

    @property
    def clip_encoders(self) -> tuple[str, ...]:
        """The names of the text encoders that are CLIP's."""
        return tuple(name for name in self.text_encoders if self.components[name][0].startswith("CLIPText"))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The names of the tokenizers."""
        return tuple(name for name in self.components if name.startswith("tokenizer"))

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the components that have weights."""
        return (*self.text_encoders, self.denoiser, "vae")


_NETWORKS = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL", "AutoencoderTiny")}
_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_TOKENIZER = ("T5Tokenizer", "T5TokenizerFast")

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family(
        name="stable-diffusion",
        components={**_NETWORKS, "text_encoder": ("CLIPTextModel",), "tokenizer": _TOKENIZER},
        inputs=STABLE_DIFFUSION_INPUTS,
        guidance_scale=7.5,
        mends_scheduler=True,
    ),
    "StableDiffusionXLPipeline": Family(
        name="stable-diffusion-xl",
        components={
            **_NETWORKS,
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "tokenizer": _TOKENIZER,
            "tokenizer_2": _TOKENIZER,
        },
        inputs=STABLE_DIFFUSION_XL_INPUTS,
        guidance_scale=5.0,
    ),
    "StableDiffusion3Pipeline": Family(
        name="stable-diffusion-3",
        components={
            "transformer": ("SD3Transformer2DModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModelWithProjection",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "text_encoder_3": ("T5EncoderModel",),
            "tokenizer": _TOKENIZER,
            "tokenizer_2": _TOKENIZER,
            "tokenizer_3": _T5_TOKENIZER,
        },
        inputs=TRANSFORMER_INPUTS,
        guidance_scale=7.0,
        denoiser="transformer",
        steps=28,
        spacing="linspace",
        max_tokens=256,
    ),
    "FluxPipeline": Family(
        name="flux",
        components={
            "transformer": ("FluxTransformer2DModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("T5EncoderModel",),
            "tokenizer": _TOKENIZER,
            "tokenizer_2": _T5_TOKENIZER,
        },
        inputs=TRANSFORMER_INPUTS,
        guidance_scale=3.5,
        denoiser="transformer",
        steps=28,
        spacing="trailing",
        max_tokens=512,
    ),
    "ZImagePipeline": Family(
        name="z-image",
        components={
            "transformer": ("ZImageTransformer2DModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("Qwen3Model",),
            "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        },
        inputs=Z_IMAGE_INPUTS,
        guidance_scale=6.0,
        denoiser="transformer",
        steps=50,
        spacing="trailing",
        distilled_steps=8,
        max_tokens=512,
        is_torch_alone=True,
    ),
}
"""The pipeline classes that can be exported, beside those of `SAME_NETWORKS`."""
SAME_NETWORKS = {
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}
"""Classes whose networks are those of another one. What they do with a picture and its mask is done by the server."""
REFINER = "the server does not run SDXL's refiner"
WHY_NOT = {
    "StableDiffusionXLImg2ImgPipeline": REFINER,
    "FluxFillPipeline": "its transformer needs a mask as an input",
    "FluxControlPipeline": "its transformer needs another picture as an input",
    "FluxKontextPipeline": "its transformer needs another picture as an input",
    "ZImageOmniPipeline": "its transformer needs other pictures as an input",
    "ZImageControlNetPipeline": "its transformer needs what a control network makes as an input",
}
"""Why some classes are not exported although they look similar."""
NOT_EXPORTED = ("safety_checker", "feature_extractor", "image_encoder")
INDEX_KEYS = {
    *NOT_EXPORTED,
    "scheduler",
    "requires_safety_checker",
    "force_zeros_for_empty_prompt",
    "add_watermarker",
    "requires_aesthetics_score",
}
"""Keys of model_index.json beside the components."""
MAX_WHOLE = 1 << 24
"""Far above any size of a network, and small enough to compute with."""
SNAPSHOT = "snapshots/*/model_index.json"
"""Where a download lies within the folder that is named after the model."""
CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class ExportError(Exception):
    """A pipeline cannot be exported; the message names every fault, and what to do about it."""


@dataclass
class Findings:
    """The faults of a folder, and the differences from diffusers.

    Attributes:
        faults: why it cannot be exported.
        notes: substitutions, and parts that are left out: printed, kept in the manifest and shown to clients.
    """

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self) -> None:
        """Raises if there is a fault.

        Raises:
            ExportError: with all faults.
        """
        if self.faults:
            raise ExportError("; ".join(self.faults))


@dataclass(frozen=True)
class Source:
    """A diffusers folder.

    Attributes:
        family: what its class belongs to.
        index: model_index.json.
        configs: the configuration of each component by its name there.
        licence: what the model card in the folder says, such as "apache-2.0"; empty where it says nothing.
    """

    folder: Path
    family: Family
    index: Config
    configs: Mapping[str, Config]
    licence: str = ""

    @property
    def pipeline_class(self) -> str:
        """The class of diffusers that loads it."""
        found = str(self.index["_class_name"])
        return SAME_NETWORKS.get(found, found)

    @property
    def mends_clip_sample(self) -> bool:
        """Whether the folder's own class sets clip_sample to False, whatever the scheduler's file says."""
        return self.family.mends_scheduler and self.index["_class_name"] not in SAME_NETWORKS


def read(folder: Path, findings: Findings) -> Source:
    """Reads a folder; what is wrong with its index goes to `findings`.

    Raises:
        ExportError: it is no diffusers folder, a file is missing or not JSON, or a class cannot be exported.
    """
    if not folder.exists():
        raise ExportError(f"there is no {folder}")
    if folder.is_file():
        raise ExportError(f"{folder} is a file; a checkpoint in one file ends with {', '.join(CHECKPOINTS)}")
    if not (folder / "model_index.json").is_file():
        raise ExportError(
            f"{folder} is no diffusers folder: it has no model_index.json"
            + "".join(f"; {hint}" for hint in _hints(folder)[:1])
        )
    index = read_json(folder / "model_index.json")
    family = _family(folder, index)
    for key in index:
        if not key.startswith("_") and key not in family.components and key not in INDEX_KEYS:
            findings.faults.append(f"model_index.json: {key} is not known to this exporter")
    for name, classes in family.components.items():
        found = _class_of(index, name) or "missing"
        if found not in classes:
            what = found if found == "missing" else f"a {found}"
            findings.faults.append(f"model_index.json: {name} is {what}; what can be exported: {', '.join(classes)}")
    if index.get("requires_aesthetics_score"):
        findings.faults.append(f"model_index.json: requires_aesthetics_score: {REFINER}")
    findings.require()
    configs = {name: read_json(folder / name / "config.json") for name in family.networks}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    for name, config in configs.items():
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        findings.faults += type_faults(f"{name}/{file}", config)
    findings.require()
    for name in NOT_EXPORTED:
        if name != "feature_extractor" and _class_of(index, name):
            findings.notes.append(f"{name} ({_class_of(index, name)}) is not exported: pictures do not pass through it")
    if index.get("add_watermarker"):
        findings.notes.append("add_watermarker is not served: pictures have no watermark")
    return Source(folder, family, index, configs, licence_of(folder / "README.md"))


def type_faults(file: str, config: Config) -> list[str]:
    """The faults of the values of a configuration that are computed with, each of which must be of diffusers' type."""
    return [
        f"{file}: {key} {config[key]!r} cannot be read: it must be {what}"
        for keys, is_good, what in _FORMS
        for key in keys
        if key in config and not is_good(config[key])
    ]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_WHOLE


def _are_whole(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_whole, value))


_NUMBERS = (
    "hidden_size",
    "projection_dim",
    "d_model",
    "latent_channels",
    "in_channels",
    "pos_embed_max_size",
    "max_position_embeddings",
    "num_train_timesteps",
    "steps_offset",
    "cap_feat_dim",
    "dim",
    "n_heads",
)
_LISTS = (
    "block_out_channels",
    "decoder_block_out_channels",
    "axes_dims",
    "axes_lens",
    "conditioning_embedding_out_channels",
)
_FORMS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_NUMBERS, _is_whole, "a whole number"),
    (("patch_size",), lambda value: _is_whole(value) and value > 0, "a whole number from 1 on"),
    (("beta_start", "beta_end"), lambda value: isinstance(value, int | float) and 0 <= value < 1, "from 0 to below 1"),
    (_LISTS, lambda value: value is None or _are_whole(value), "a list of whole numbers"),
    (
        ("sample_size",),
        lambda value: value is None or _is_whole(value) or (_are_whole(value) and len(value) == 2),
        "a whole number, or two of them",
    ),
)
"""Keys, what their values must be, and that in words."""


def _family(folder: Path, index: Config) -> Family:
    found = str(index.get("_class_name"))
    family = FAMILIES.get(SAME_NETWORKS.get(found, found))
    if family is None:
        why = f" ({WHY_NOT[found]})" if found in WHY_NOT else ""
        raise ExportError(f"{folder} is a {found}{why}; what can be exported: {', '.join((*FAMILIES, *SAME_NETWORKS))}")
    return family


def scheduler_class(source: Source) -> str:
    """The class that the folder was saved with; the scheduler's own file decides, as in diffusers the index does."""
    return _class_of(source.index, "scheduler") or str(source.configs["scheduler"].get("_class_name", ""))


def licence_of(card: Path) -> str:
    """The licence in a model card's front matter; `license_name` where `license` is "other"."""
    if not card.is_file():
        return ""
    front = re.match(r"---\s*\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    found = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([\w.+-]+)", front[1] if front else "", re.MULTILINE))
    licence = found.get("license", "")
    return str(found.get("license_name", "") if licence in ("other", "unknown") else licence)


def _class_of(index: Config, name: str) -> str:
    """The class of a component in model_index.json; empty where it has none."""
    entry = index.get(name)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else ""


def read_json(file: Path) -> Config:
    """A file's JSON object.

    Raises:
        ExportError: it cannot be read, or is another thing.
    """
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise ExportError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ExportError(f"{file} is not a JSON object")
    return found


def _hints(folder: Path) -> list[str]:
    """What is in a folder without a model_index.json that the user may have meant, the likeliest first."""
    found = ["it was exported already: serve it, or add --quantize"] if (folder / "pipeline.json").is_file() else []
    if (folder / "config.json").is_file():
        return [*found, "it is one network, not a pipeline: give the folder of the pipeline"]
    found += [f"{at.parent} is one" for at in (*folder.glob("*/model_index.json"), *folder.glob(SNAPSHOT))]
    checkpoints = sorted(file.name for file in folder.glob("*") if file.suffix in CHECKPOINTS)
    return found + [f"{name} in it is a checkpoint: give that file" for name in checkpoints]
