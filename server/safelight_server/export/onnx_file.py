"""Writes a network as an ONNX file of float16 weights and float32 arithmetic, and checks it against torch."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

OPSET = 18
SMALL = 64
"""Weights of fewer values stay float32: a cast would cost more than it saves."""
PARITY = 2e-4
"""Largest deviation, relative to the largest value, of ONNX Runtime from torch in float32."""


def write_onnx(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    """Exports `module` with a free batch axis."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own internals
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    _strip(model)
    _store_half(model)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def check_parity(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> float:
    """Runs file and module on batches of 1 and 3 and returns the worst deviation; stops the export above `PARITY`."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in (1, 3):
        batch = {name: torch.cat([tensor, tensor])[:rows] for name, tensor in inputs.items()}
        expected = module(**batch)
        expected = expected if isinstance(expected, tuple) else (expected,)
        results = session.run(list(outputs), {name: tensor.numpy() for name, tensor in batch.items()})
        for result, reference in zip(results, expected, strict=True):
            reference = reference.numpy()
            worst = float(np.maximum(worst, np.abs(result - reference).max() / np.abs(reference).max()))
    if not worst <= PARITY:  # also where it is no number
        raise SystemExit(f"{path.parent.parent.name}: ONNX Runtime is off by {worst:.1e}, more than {PARITY}")
    return worst


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _strip(model: onnx.ModelProto) -> None:
    """Removes what the exporter notes about source files: a megabyte, and a path of the machine."""
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    del graph.metadata_props[:], graph.value_info[:]
    graph.doc_string = ""
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]


def _store_half(model: onnx.ModelProto) -> None:
    casts = []
    for initializer in model.graph.initializer:
        values = numpy_helper.to_array(initializer)
        if values.dtype != np.float32 or values.size < SMALL:
            continue
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue  # a constant of the graph, not a rounded weight
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(half, name + ".half"))
        casts.append(helper.make_node("Cast", [name + ".half"], [name], name=name + ".cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
