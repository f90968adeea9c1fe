"""Exports a CLIP of transformers as a judge of prompt agreement; `quality/judge.py` has the files.

Both towers are checked against torch, and the tokenizer against transformers' on the texts
that pipelines are checked on. Imports torch and transformers.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from safelight_server.export import manifest
from safelight_server.export.exporter import round_weights
from safelight_server.export.onnx_file import check_parity, write_onnx
from safelight_server.export.source import ExportError
from safelight_server.quality.judge import CONFIG_FILE, IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE, JudgeConfig, PromptJudge

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What CLIP's pictures are normalised by, where the folder has no preprocessor_config.json."""


class TextTower(nn.Module):
    """input_ids (B, T) int64 -> text_embeds (B, D)."""

    outputs = ("text_embeds",)

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.model, self.projection = clip.text_model, clip.text_projection

    def forward(self, input_ids: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.model(input_ids=input_ids).pooler_output)
        return projected


class ImageTower(nn.Module):
    """pixel_values (B, 3, P, P) -> image_embeds (B, D)."""

    outputs = ("image_embeds",)

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.model, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.model(pixel_values=pixel_values).pooler_output)
        return projected


@torch.no_grad()
def export_judge(folder: Path, out: Path, report: Callable[[str], None] = lambda _: None) -> None:
    """Writes the judge `out` from a folder of a CLIPModel. `out` appears when it is whole and was tried.

    Raises:
        ExportError: the folder is no CLIP, cannot be read, or is another network as a file than in torch.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; remove it first")
    clip, tokenizer = _load(folder)
    round_weights(clip)
    length = manifest.max_tokens(tokenizer, clip.text_model)
    edge = int(clip.config.vision_config.image_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        made = Path(name) / out.name
        made.mkdir()
        entry = manifest.tokenizer(tokenizer, clip.text_model, made / TOKENIZER_FILE, length)
        ids = tokenizer(["a red potion"], padding="max_length", truncation=True, max_length=length).input_ids
        generator = torch.Generator().manual_seed(0)
        examples = (
            (TextTower(clip), {"input_ids": torch.tensor(ids)}, TEXT_FILE),
            (ImageTower(clip), {"pixel_values": torch.randn(1, 3, edge, edge, generator=generator)}, IMAGE_FILE),
        )
        for tower, example, file in examples:
            report(f"writing {file}")
            write_onnx(tower.eval(), [example], tower.outputs, made / file)
            worst = check_parity(tower, [example], tower.outputs, made / file)
            report(f"{file}: within {worst:.0e} of torch")
        mean, std = _normalisation(folder)
        config = JudgeConfig(
            format=1, name=folder.resolve().name, max_tokens=length, pad_id=entry["pad_id"], bos_id=entry["bos_id"],
            eos_id=entry["eos_id"], image_px=edge, mean=mean, std=std,
        )  # fmt: skip
        (made / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
        PromptJudge(made)
        shutil.move(made, out)


def _load(folder: Path) -> tuple[CLIPModel, Any]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        clip, found = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"{folder} cannot be read as a CLIPModel: {str(error).splitlines()[0]}") from None
    if found["missing_keys"]:
        raise ExportError(f"{folder}: {len(found['missing_keys'])} weights of a CLIPModel are missing")
    return clip.eval(), tokenizer


def _normalisation(folder: Path) -> tuple[Any, Any]:
    file = folder / "preprocessor_config.json"
    if not file.exists():
        return MEAN, STD
    try:
        found = json.loads(file.read_text())
        return tuple(found.get("image_mean", MEAN)), tuple(found.get("image_std", STD))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ExportError(f"{file}: {error}") from None
