"""Makes Triton's config.pbtxt of a component, which both Triton and the `onnx` runtime read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

TYPES = {torch.float32: "TYPE_FP32", torch.int64: "TYPE_INT64"}


def write_config(
    path: Path, model: str, max_rows: int, examples: Sequence[Mapping[str, Tensor]], module: nn.Module
) -> None:
    """Writes the configuration; shapes come from example tensors with the batch first, open ones where they differ."""
    shapes: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    types: dict[str, torch.dtype] = {}
    for inputs in examples:
        results = module(**inputs)
        results = results if isinstance(results, tuple) else (results,)
        tensors = [("input", name, tensor) for name, tensor in inputs.items()]
        tensors += [("output", name, tensor) for name, tensor in zip(module.outputs, results, strict=True)]
        for side, name, tensor in tensors:
            shapes.setdefault((side, name), []).append(tuple(tensor.shape[1:]))
            types[name] = tensor.dtype
    lines = [f'name: "{model}"', 'backend: "onnxruntime"', f"max_batch_size: {max_rows}"]
    for (side, name), found in shapes.items():
        lines += [f"{side} {{", f'  name: "{name}"', f"  data_type: {TYPES[types[name]]}", *_dims(found), "}"]
    lines += [
        "dynamic_batching { max_queue_delay_microseconds: 0 }",
        "instance_group { kind: KIND_CPU count: 1 }",
        'parameters { key: "intra_op_thread_count" value { string_value: "1" } }',
    ]
    path.write_text("\n".join(lines) + "\n")


def _dims(found: list[tuple[int, ...]]) -> list[str]:
    """A scalar a row is dims [1] for clients and no axis for the model; -1 is an axis that differs with the size."""
    shape = [axis[0] if len(set(axis)) == 1 else -1 for axis in zip(*found, strict=True)]
    return [f"  dims: {shape}"] if shape else ["  dims: [1]", "  reshape { shape: [] }"]
