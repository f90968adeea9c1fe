"""Writes a network as an ONNX file of float16 weights and float32 arithmetic, and checks it against torch."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from safelight_server.catalog.catalog import DATA_FILE
from safelight_server.export.source import ExportError

OPSET = 18
SMALL = 64
"""Weights of fewer values stay float32: a cast would cost more than it saves."""
PARITY = 2e-4
"""Largest deviation, relative to the largest value, of ONNX Runtime from torch in float32."""
EXTERNAL_BYTES = 1 << 30
"""Weights of more bytes go to a file beside the model: protobuf holds no 2 GiB."""
ALIGNMENT = 4096

Inputs = Mapping[str, Tensor]
Values = npt.NDArray[Any]
Axes = dict[str, dict[int, Any]]
"""The free axes of each input, as torch.export takes them."""


def write_onnx(
    module: nn.Module,
    examples: Sequence[Inputs],
    outputs: Sequence[str],
    path: Path,
    multiple: int = 1,
    largest: int | None = None,
) -> Path | None:
    """Exports `module` with a free batch axis; axes in which the examples differ are free too.

    Args:
        multiple: what free axes are multiples of: how often the network halves them.
        largest: what free axes are at most; None: there is no limit.

    Returns:
        The file with the weights, if they are many.
    """
    taken = inspect.signature(module.forward).parameters  # torch has the inputs, and wants their axes, in this order
    examples = [{name: example[name] for name in taken if name in example} for example in examples]
    given = max(examples, key=num_values)  # not an edge of one multiple, which torch takes for a constant
    axes = free_axes(examples, multiple, largest)
    program = exported(module, given, list(given), outputs, axes, path.parent.parent.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = move_weights([program.model], path)
    model = stored(program)
    del program
    save(model, path)
    return data


def exported(
    module: nn.Module,
    given: Mapping[str, Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Any],
    name: str,
) -> Any:
    """torch's ONNX program of a module.

    Args:
        given: arguments of the module: tensors, or tuples of them.
        inputs: names of all tensors in `given`.
        axes: the free axes, of the structure of `given`.
        name: for errors.

    Raises:
        ExportError: torch cannot export it.
    """
    with warnings.catch_warnings(), _refusals(name):
        warnings.simplefilter("ignore")  # of torch about its own internals
        return torch.onnx.export(
            module,
            (),
            kwargs=dict(given),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )


def stored(program: Any) -> onnx.ModelProto:
    """An ONNX program as it is stored: weights in float16, and no notes about source files."""
    model = program.model_proto
    _strip(model)
    _store_half(model)
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes and checks a model."""
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turns torch's error about a network that it cannot export into an ExportError of one line."""
    try:
        yield
    except torch.onnx.errors.OnnxExporterError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise ExportError(f"{name}: torch cannot export this network: {why}") from error


def num_values(inputs: Inputs) -> int:
    """The number of values in an example."""
    return sum(tensor.numel() for tensor in inputs.values())


def free_axes(examples: Sequence[Inputs], multiple: int | Mapping[str, int], largest: int | None = None) -> Axes:
    """torch.export's dynamic shapes by input: the batch, and height and width where the examples have several.

    Args:
        multiple: of what they are multiples, by input where that differs.
    """
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = {}
    for name in examples[0]:
        free: dict[int, Any] = {0: batch}
        for axis in range(1, examples[0][name].ndim):
            sizes = {int(example[name].shape[axis]) for example in examples}
            if len(sizes) > 1:
                factor = multiple if isinstance(multiple, int) else multiple[name]
                edge = torch.export.Dim(f"edge{axis}", max=None if largest is None else largest // factor)
                free[axis] = factor * edge if factor > 1 else edge
        shapes[name] = free
    return shapes


def check_parity(module: nn.Module, examples: Sequence[Inputs], outputs: Sequence[str], path: Path) -> float:
    """Runs file and module on batches of 1 and 3 of each example and returns the worst deviation.

    Raises:
        ExportError: it is above `PARITY`.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs in examples:
        for rows in (1, 3):
            batch = {name: torch.cat([tensor, tensor])[:rows] for name, tensor in inputs.items()}
            expected = module(**batch)
            expected = expected if isinstance(expected, tuple) else (expected,)
            results = session.run(list(outputs), {name: tensor.numpy() for name, tensor in batch.items()})
            for result, reference in zip(results, expected, strict=True):
                reference = reference.numpy()
                worst = float(np.maximum(worst, np.abs(result - reference).max() / np.abs(reference).max()))
    if not worst <= PARITY:  # also where it is no number
        raise ExportError(f"{path.parent.parent.name}: ONNX Runtime is off by {worst:.1e}, more than {PARITY}")
    return worst


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


def _stored(values: Values) -> Values:
    """Weights as they are stored: float16, except few of them, and constants of the graph that float16 cannot hold."""
    if values.dtype != np.float32 or values.size < SMALL:
        return values
    half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else values


def move_weights(models: Sequence[onnx_ir.Model], path: Path) -> Path | None:
    """Moves the weights to a file of their own beside `path`, if they are many.

    One at a time, as a copy of all may not fit.

    Returns:
        That file, if there is one.
    """
    large = [
        (model.graph.initializers, name, value.const_value)
        for model in models
        for name, value in model.graph.initializers.items()
        if value.const_value.dtype == onnx_ir.DataType.FLOAT and value.const_value.nbytes >= 2 * ALIGNMENT
    ]
    if sum(tensor.nbytes for _, _, tensor in large) // 2 <= EXTERNAL_BYTES:
        return None
    path = path.with_name(DATA_FILE)
    with path.open("wb") as stream:
        for initializers, name, tensor in large:
            half = np.ascontiguousarray(_stored(tensor.numpy()))
            stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
            initializers[name].const_value = onnx_ir.ExternalTensor(
                path.name,
                stream.tell(),
                half.nbytes,
                onnx_ir.DataType.from_numpy(half.dtype),
                shape=onnx_ir.Shape(half.shape),
                name=name,
            )
            stream.write(half.data)
    return path


def _store_half(model: onnx.ModelProto) -> None:
    """Stores weights as float16, and casts them where they are used; those in a file of their own are float16 there."""
    casts = []
    for initializer in model.graph.initializer:
        name = initializer.name
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            if initializer.data_type != onnx.TensorProto.FLOAT16:
                continue
            initializer.name = name + ".half"
        else:
            values = numpy_helper.to_array(initializer)
            stored = _stored(values)
            if stored is values:
                continue
            initializer.CopyFrom(numpy_helper.from_array(stored, name + ".half"))
        casts.append(helper.make_node("Cast", [name + ".half"], [name], name=name + ".cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
