"""The parts of pipeline.json that need the weights: the tokenizer, the linear preview, the prompts; and its text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from safelight_server.catalog.digest import sha256
from safelight_server.catalog.tokenizer import Tokenizer
from safelight_server.export import plan
from safelight_server.export.plan import ExportPlan
from safelight_server.export.source import ExportError

FIT_LATENTS = 512
FIT_EDGE = 8
"""The linear preview is fitted on this many latents of at most this edge."""
PROBES = (
    "",
    " ",
    "a red potion",
    "A photo of an ASTRONAUT, 8k!!",
    "naïve café",
    "don't  stop\n42%",
    "龍の剣 🗡️",
    "x " * 200,
    "wow! !",
    "a<|endoftext|> b",
)
"""Texts that both tokenizers must cut into the same ids: SDXL's second one takes an exclamation mark for padding."""


def max_tokens(tokenizer: Any, text_encoder: Any) -> int:
    """Length of the text encoder's context; tokenizers that were saved without one have 1e30."""
    return int(min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings))


def as_chat(given: Any, text: str) -> str:
    """`text` as the message of a user in the chat template of a tokenizer, as ZImagePipeline writes it."""
    messages = [{"role": "user", "content": text}]
    written: str = given.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return written


def _template(given: Any, what: str) -> dict[str, Any]:
    """What the manifest says of a tokenizer's chat template: the texts before and after a prompt.

    Raises:
        ExportError: there is no template, or it does more than to stand around a prompt.
    """
    if not given.chat_template:
        raise ExportError(f"{what}: it has no chat_template, in which this text encoder reads prompts")
    if given.padding_side != "right":
        raise ExportError(
            f"{what}: padding_side {given.padding_side!r} cannot be served: padding stands behind a prompt"
        )
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    before, found, after = as_chat(given, mark).partition(mark)
    if not (found and before and after) or any(as_chat(given, text) != before + text + after for text in PROBES):
        raise ExportError(f"{what}: chat_template changes prompts; one that only stands around them can be served")
    num_tokens = len(given(before, add_special_tokens=False).input_ids)
    return {"before": before, "after": after, "num_tokens_before": num_tokens}


def tokenizer(given: Any, text_encoder: Any, file: Path, length: int) -> dict[str, Any]:
    """Saves a tokenizer to `file`; returns what the manifest says of it.

    Args:
        length: of the text encoder's context.

    Raises:
        ExportError: the server's tokenizer would make other ids of a text than transformers does.
    """
    given._tokenizer.save(str(file))
    entry = {
        "file": file.name,
        "sha256": sha256(file),
        "max_tokens": length,
        "pad_id": given.pad_token_id,
        "bos_id": given.bos_token_id,
        "eos_id": given.eos_token_id,
    }
    around = None
    if text_encoder.config.model_type == "qwen3":
        entry["template"] = template = _template(given, file.stem)
        around = template["before"], template["after"]
        entry["bos_id"], entry["eos_id"] = None, given(around[1], add_special_tokens=False).input_ids[0]
    has_begin = text_encoder.config.model_type != "t5" and around is None
    if None in (entry["pad_id"], entry["eos_id"], entry["bos_id"] if has_begin else 0):
        raise ExportError(f"{file.stem}: it lacks a token for the begin, for the end, or for padding")
    ours = Tokenizer(file, length, entry["pad_id"], entry["bos_id"], entry["eos_id"], around)
    for text in PROBES:
        written = text if around is None else as_chat(given, text)
        theirs = given(written, padding="max_length", truncation=True, max_length=length).input_ids
        if list(ours.encode(text).ids) != theirs:
            raise ExportError(f"{file.stem}: the server would make other tokens of {text!r} than transformers does")
        if max(theirs) >= text_encoder.config.vocab_size:
            raise ExportError(f"{file.stem}: {text!r} has a token that the text encoder does not know")
    return entry


def linear_preview(made: ExportPlan, given: Path, decoder: nn.Module) -> dict[str, object]:
    """From `given`, an npz of weights (C, 3 * k * k) and bias, else fitted to what the decoder makes of latents.

    Raises:
        ExportError: the arrays of `given` have other shapes.
    """
    if given.exists():
        with np.load(given) as arrays:
            weights, bias = arrays["weights"], arrays["bias"]
    else:
        weights, bias = _fit_linear(made, decoder)
    block = round((weights.shape[1] / 3) ** 0.5)
    if weights.shape != (made.shape[0], 3 * block**2) or bias.shape != (3 * block**2,):
        raise ExportError(f"{given}: weights {weights.shape} and bias {bias.shape} are not C x 3kk and 3kk")
    rounded = np.round(weights.astype(float), 5), np.round(bias.astype(float), 5)
    return {"block": block, "weights": rounded[0].tolist(), "bias": rounded[1].tolist()}


@torch.no_grad()
def _fit_linear(made: ExportPlan, decoder: nn.Module) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Least squares, one RGB value a latent pixel, on random latents that are alike in a neighbourhood."""
    channels, height, width = made.shape
    height, width = min(height, FIT_EDGE), min(width, FIT_EDGE)
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(FIT_LATENTS, channels, 1, 1, generator=generator)
    latents = level + 0.3 * torch.randn(FIT_LATENTS, channels, height, width, generator=generator)
    at = plan.draft(made)["latent"]
    images = torch.cat([decoder(part / at["scaling_factor"] + at["shift_factor"]) for part in latents.split(16)])
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
