"""Reads the configurations of a diffusers folder, without torch and without its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

PIPELINES = ("StableDiffusionPipeline",)
"""The pipeline classes that can be exported."""
COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""The classes of a pipeline's components that can be exported."""
NOT_EXPORTED = ("safety_checker", "feature_extractor", "image_encoder")
INDEX_KEYS = {*COMPONENTS, *NOT_EXPORTED, "scheduler", "requires_safety_checker", "force_zeros_for_empty_prompt"}
CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class ExportError(Exception):
    """A pipeline cannot be exported; the message names every fault, and what to do about it."""


@dataclass
class Findings:
    """What was found wrong with a folder, and what will differ from diffusers.

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
        index: model_index.json.
        configs: the configuration of each component by its name there.
        licence: what the model card in the folder says, such as "apache-2.0"; empty where it says nothing.
    """

    folder: Path
    index: Config
    configs: Mapping[str, Config]
    licence: str = ""


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
            + "".join(f"; {file.name} in it is a checkpoint: give that file" for file in _checkpoints(folder)[:1])
        )
    index = _json(folder / "model_index.json")
    found = index.get("_class_name")
    if found not in PIPELINES:
        raise ExportError(f"{folder} is a {found}; what can be exported: {', '.join(PIPELINES)}")
    for key in index:
        if not key.startswith("_") and key not in INDEX_KEYS:
            findings.faults.append(f"model_index.json: {key} is not known to this exporter")
    configs = {}
    for name, classes in COMPONENTS.items():
        found = _class_of(index, name)
        if found not in classes:
            findings.faults.append(f"model_index.json: {name} is a {found}; what can be exported: {', '.join(classes)}")
    findings.require()
    for name, file in {
        "unet": "config.json",
        "vae": "config.json",
        "text_encoder": "config.json",
        "scheduler": "scheduler_config.json",
    }.items():
        configs[name] = _json(folder / name / file)
    optional = folder / "tokenizer" / "tokenizer_config.json"
    configs["tokenizer"] = _json(optional) if optional.is_file() else {}
    for name in NOT_EXPORTED:
        if name != "feature_extractor" and _class_of(index, name):
            findings.notes.append(f"{name} ({_class_of(index, name)}) is not exported: pictures do not pass through it")
    return Source(folder, index, configs, licence_of(folder / "README.md"))


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


def _json(file: Path) -> Config:
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise ExportError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ExportError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ExportError(f"{file} is not a JSON object")
    return found


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in CHECKPOINTS) if folder.is_dir() else []
