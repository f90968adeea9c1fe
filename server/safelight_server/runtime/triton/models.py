"""Maps pipeline components to Triton models, and checks a server's model config against our repository.

The expected names, versions and shapes come from the model repository that the
catalog has read; the config that a server reports must agree with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import model_config_pb2 as pb

from safelight_server.catalog import config_pbtxt
from safelight_server.catalog.catalog import DATA_FILE, Catalog
from safelight_server.catalog.config_pbtxt import ModelConfig
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import Array, FloatArray
from safelight_server.runtime.base import Inputs, StableRows
from safelight_server.runtime.verification import InputSpec

MESSAGE_BYTES = (2 << 30) - (1 << 20)
"""What a message of gRPC can hold is below 2 GiB, of which a part is left for names and shapes."""
ModelKey = tuple[str, Component]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a Triton model.

    Attributes:
        dims: shape of one row as the server takes it; -1 is any length.
        row_shape: shape of one row as the network takes it (a scalar is () here and (1,) in `dims`).
        datatype: Triton's name of the type, such as "FP32".
    """

    name: str
    dims: tuple[int, ...]
    row_shape: tuple[int, ...]
    datatype: str
    dtype: npt.DTypeLike

    @property
    def is_static(self) -> bool:
        """Whether the length of every axis is known, as a place in shared memory needs."""
        return -1 not in self.dims

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; only if `is_static`."""
        return math.prod(self.dims) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Model:
    """A component's model as our repository describes it.

    Attributes:
        name: Triton's name of the model.
        expected: batch bound and shapes from our config.pbtxt.
    """

    key: ModelKey
    name: str
    version: str
    expected: ModelConfig


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as a server describes it.

    Attributes:
        max_rows: largest batch: the smaller of the server's bound and ours.
    """

    max_rows: int
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def shapes(self, inputs: Inputs) -> Shapes:
        """The shapes of a call's rows for the inputs whose shapes are open, in the order of the inputs."""
        return tuple(_row_shape(inputs[name]) for name, at in self.inputs.items() if not at.is_static)

    def sized(self, inputs: Inputs, outputs: Mapping[str, FloatArray]) -> ServedModel:
        """The same model with the shapes of a call and its results in place of those that are open."""
        return ServedModel(
            self.max_rows,
            {name: _closed(at, _row_shape(inputs[name])) for name, at in self.inputs.items()},
            {name: _closed(at, outputs[name].shape[1:]) for name, at in self.outputs.items()},
        )

    def specs(self) -> list[InputSpec]:
        """Names, shapes and types of the inputs, from which `verification` makes example batches."""
        return [InputSpec(at.name, at.row_shape, at.datatype == "INT64") for at in self.inputs.values()]


class ModelMismatch(Exception):
    """A server's model differs from the one in our repository; the message says how."""


_TYPES: dict[int, tuple[str, npt.DTypeLike]] = {
    pb.TYPE_FP32: ("FP32", np.float32),
    pb.TYPE_INT64: ("INT64", np.int64),
}


def weight_bytes(files: Iterable[Path]) -> int:
    """Bytes of ONNX files, with the weights that are in files of their own."""
    parts = [part for file in files for part in (file, file.with_name(DATA_FILE))]
    return sum(part.stat().st_size for part in parts if part.exists())


def most_rows(sizes: Sequence[Sequence[InputSpec]], bound: int) -> int:
    """Largest batch, at most `bound`, that fits into a message of gRPC at all sizes.

    What goes through shared memory is bounded too: a call goes over gRPC where there is no room for it.
    """
    row_bytes = max(sum((8 if at.is_ids else 4) * math.prod(at.shape) for at in specs) for specs in sizes)
    return max(1, min(bound, MESSAGE_BYTES // row_bytes))


def _row_shape(rows: Array | StableRows) -> tuple[int, ...]:
    return rows.shape if isinstance(rows, StableRows) else rows.shape[1:]


def _closed(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.is_static else replace(tensor, dims=shape, row_shape=shape)


def models_of(catalog: Catalog) -> list[Model]:
    """The Triton model of every component of every pipeline.

    Raises:
        config_pbtxt.ConfigError: a config.pbtxt cannot be read.
    """
    found = []
    for pipeline in catalog.pipelines.values():
        for component, file in pipeline.files.items():
            at = pipeline.manifest.components[component]
            expected = config_pbtxt.read(file.parent.parent / "config.pbtxt")
            found.append(Model((pipeline.name, component), at.model, str(at.version), expected))
    return found


def served(model: Model, config: pb.ModelConfig) -> ServedModel:
    """Checks the config that a server reports for a model against the expected one.

    Raises:
        ModelMismatch: the tensors differ, or the model does not take batches.
    """
    inputs, outputs = _tensors(model, config.input), _tensors(model, config.output)
    faults = _differences(model.expected.inputs, inputs) + _differences(model.expected.outputs, outputs)
    if config.max_batch_size < 1:
        faults.append("max_batch_size is 0")
    if faults:
        raise ModelMismatch(f"{model.name}: " + "; ".join(faults))
    return ServedModel(min(model.expected.max_rows, config.max_batch_size), inputs, outputs)


def _tensors(model: Model, tensors: list[pb.ModelInput] | list[pb.ModelOutput]) -> dict[str, Tensor]:
    found = {}
    for at in tensors:
        if at.data_type not in _TYPES:
            raise ModelMismatch(f"{model.name}: {at.name} has type {pb.DataType.Name(at.data_type)}")
        row_shape = tuple(at.reshape.shape) if at.HasField("reshape") else tuple(at.dims)
        found[at.name] = Tensor(at.name, tuple(at.dims), row_shape, *_TYPES[at.data_type])
    return found


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> list[str]:
    faults = []
    for name in sorted({*expected, *found}):
        ours, theirs = expected.get(name), found[name].dims if name in found else None
        if ours != theirs:
            faults.append(f"{name} is {theirs or 'absent'}, in our repository {ours or 'absent'}")
    return faults
