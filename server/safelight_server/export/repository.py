"""Makes Triton's config.pbtxt of a component, which both Triton and the `onnx` runtime read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

TYPES = {torch.float32: "TYPE_FP32", torch.int64: "TYPE_INT64"}


def write_config(path: Path, model: str, max_rows: int, inputs: Mapping[str, Tensor], module: nn.Module) -> None:
    """Writes the configuration; shapes come from example tensors with the batch first."""
    results = module(**inputs)
    results = results if isinstance(results, tuple) else (results,)
    tensors = [("input", name, tensor) for name, tensor in inputs.items()]
    tensors += [("output", name, tensor) for name, tensor in zip(module.outputs, results, strict=True)]
    lines = [f'name: "{model}"', 'backend: "onnxruntime"', f"max_batch_size: {max_rows}"]
    for side, name, tensor in tensors:
        lines += [f"{side} {{", f'  name: "{name}"', f"  data_type: {TYPES[tensor.dtype]}", *_dims(tensor), "}"]
    lines += [
        "dynamic_batching { max_queue_delay_microseconds: 0 }",
        "instance_group { kind: KIND_CPU count: 1 }",
        'parameters { key: "intra_op_thread_count" value { string_value: "1" } }',
    ]
    path.write_text("\n".join(lines) + "\n")


def _dims(tensor: Tensor) -> list[str]:
    """A scalar a row is dims [1] for clients and no axis for the model."""
    shape = list(tensor.shape[1:])
    return [f"  dims: {shape}"] if shape else ["  dims: [1]", "  reshape { shape: [] }"]
