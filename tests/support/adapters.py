"""Adapters (LoRA) for tests: files in the safetensors format, written without its library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray[Any, Any]]
Targets = Sequence[tuple[str, int, int]]
TARGETS = (("down.attn1.to_q", 4, 6), ("down.attn1.to_out.0", 6, 4))
"""Layers of a small denoiser, with the sizes of their inputs and outputs."""
TEXT_TARGETS = (("text_encoder.text_model.encoder.layers.0.mlp.fc1", 3, 5),)
"""A layer of its text encoder."""


def room(targets: Targets, max_rank: int = 6) -> dict[str, Any]:
    """The entry of a manifest for the room that targets have."""
    names = ("name", "inputs", "outputs")
    return {"max_rank": max_rank, "targets": [dict(zip(names, target, strict=True)) for target in targets]}


ROOM, TEXT_ROOM = room(TARGETS), room(TEXT_TARGETS)
"""The entries `adapters` and `text_adapters` of a manifest."""
TYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}


def safetensors(
    arrays: Arrays, metadata: Mapping[str, str] | None = None, types: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of a safetensors file; `types` replaces the declared type of an array."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    body = b""
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        dtype = (types or {}).get(name) or TYPES[str(array.dtype)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return with_header(header, body)


def with_header(header: Mapping[str, Any], body: bytes) -> bytes:
    """The bytes of a safetensors file with this header, whatever it says."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def matrices(
    rank: int, seed: int = 0, targets: Targets = TARGETS, prefix: str = "base_model.model."
) -> dict[str, np.ndarray[Any, Any]]:
    """An adapter of all `targets` with peft's keys."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, inputs, outputs in targets:
        made[f"{prefix}{name}.lora_A.weight"] = rng.standard_normal((rank, inputs)).astype(np.float32)
        made[f"{prefix}{name}.lora_B.weight"] = rng.standard_normal((outputs, rank)).astype(np.float32)
    return made


def text_matrices(rank: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """An adapter of all `TEXT_TARGETS` with diffusers' keys."""
    return matrices(rank, seed, TEXT_TARGETS, "")


def write_adapter(
    folder: Path,
    name: str,
    rank: int = 2,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    arrays: Arrays | None = None,
) -> Path:
    """Writes an adapter as peft does; returns its folder.

    Args:
        arrays: its matrices; None: those of an adapter that changes the denoiser alone.
    """
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    data = safetensors(matrices(rank, seed) if arrays is None else arrays)
    (place / "adapter_model.safetensors").write_bytes(data)
    if config is not None:
        (place / "adapter_config.json").write_text(json.dumps(config))
    return place
