"""Finds the files of a network's weights and checks them by their headers, in no time and without torch."""

from __future__ import annotations

import json
import math
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight_server.export.source import Findings

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""How diffusers and transformers name weights."""
SUFFIXES = (".safetensors", ".bin")
LORA = re.compile(r"[._]lora[._]|[._]lora_(A|B|down|up)\b")
"""What is in the names of an adapter's weights."""
LFS = b"version https://git-lfs"
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class WeightFiles:
    """The weights of one network.

    Attributes:
        num_values: numbers in them, from the headers; 0 where the files are pickles, which are not opened.
    """

    files: tuple[Path, ...]
    num_values: int


def find(folder: Path, variant: str, findings: Findings) -> WeightFiles:
    """Finds the weights below `folder`, as diffusers would, and checks them; faults go to `findings`.

    Args:
        variant: such as "fp16" for files `*.fp16.safetensors`; empty for files without one.
    """
    name = folder.name
    infix = f".{variant}" if variant else ""
    for suffix in SUFFIXES:
        for stem in STEMS:
            index = folder / f"{stem}{suffix}.index{infix}.json"
            whole = folder / f"{stem}{infix}{suffix}"
            if whole.is_file():
                return _checked((whole,), name, findings)
            if index.is_file():
                try:
                    shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
                    return _checked(tuple(folder / shard for shard in shards), name, findings)
                except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                    findings.faults.append(f"{name}: {index.name} is no list of files")
                    return WeightFiles((), 0)
    variants = {
        file.name.split(".")[1].split("-")[0]
        for suffix in SUFFIXES
        for file in folder.glob(f"*.*{suffix}")
        if file.name.split(".")[0] in STEMS and file.name.count(".") == 2
    }
    if variants:
        options = " or ".join(f"--variant {one}" for one in sorted(variants))
        wanted = f"of the variant {variant}" if variant else "without a variant"
        findings.faults.append(f"{name}: no weights {wanted}; there are others: say {options}")
    else:
        findings.faults.append(f"{name}: no weights (such as {STEMS[0]}.safetensors) in {folder}")
    return WeightFiles((), 0)


def _checked(files: tuple[Path, ...], name: str, findings: Findings) -> WeightFiles:
    total = 0
    for file in files:
        fault, values = check(file)
        total += values
        if fault:
            findings.faults.append(f"{name}: {file.name} {fault}")
    return WeightFiles(files, total)


def check(file: Path) -> tuple[str, int]:
    """What is wrong with a file of weights, empty where nothing is, and how many values a safetensors file has."""
    if not file.is_file():
        return "is missing", 0
    try:
        return _check(file)
    except OSError as error:
        return f"cannot be read: {error.strerror}", 0


def _check(file: Path) -> tuple[str, int]:
    with file.open("rb") as stream:
        start = stream.read(len(LFS))
        if start == LFS:
            return "is a pointer of git-lfs, not the weights: run git lfs pull", 0
        if file.suffix != ".safetensors":
            return "", 0
        length = int.from_bytes(start[:8], "little")
        size = file.stat().st_size
        if length > min(MAX_HEADER_BYTES, size):
            return "is no safetensors file", 0
        stream.seek(8)
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
            values = sum(math.prod(map(operator.index, entry["shape"])) for entry in tensors)
            missing = 8 + length + end - size
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
            return "is no safetensors file", 0
    return (f"is cut off: {missing} bytes are missing" if missing > 0 else ""), values


def is_adapter(file: Path) -> bool:
    """Whether a file that `check` has accepted has the weights of an adapter (LoRA) in place of a network's."""
    if file.suffix != ".safetensors":
        return False
    with file.open("rb") as stream:
        keys = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return any(LORA.search(key) for key in keys)
