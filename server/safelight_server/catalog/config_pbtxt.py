"""What is needed of a Triton `config.pbtxt`: the batch bound and the tensors with their shapes.

Read by protobuf's own text format against the few fields of Triton's
`ModelConfig` that matter here (same names and numbers); all others are
skipped. Neighbour: `catalog` compares the result with the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

_FIELD = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "safelight.internal.triton"


class ConfigError(Exception):
    """A config.pbtxt is missing or is no text-format message; the message names the file."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Attributes:
    max_rows: Triton's max_batch_size.
    inputs: shapes without the row axis by tensor name; -1 is any size.
    outputs: likewise.
    """

    max_rows: int
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]


class _Tensor(Protocol):
    name: str
    dims: Sequence[int]


class _Config(Protocol):
    max_batch_size: int
    input: Sequence[_Tensor]
    output: Sequence[_Tensor]


def read(file: Path) -> ModelConfig:
    """Reads one config.pbtxt.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        parsed = text_format.Parse(file.read_text(), _MESSAGE(), allow_unknown_field=True)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ConfigError(f"{file}: {error}") from None
    config = cast(_Config, parsed)
    return ModelConfig(config.max_batch_size, _shapes(config.input), _shapes(config.output))


def mismatches(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What of `wanted` is absent from `found` or has another shape; -1 on either side is any size."""
    faults = []
    for name, shape in wanted.items():
        dims = found.get(name)
        if dims is None:
            faults.append(f"{name} is missing")
        elif len(dims) != len(shape) or any(a != b for a, b in zip(dims, shape, strict=True) if -1 not in (a, b)):
            faults.append(f"{name} is {list(dims)}, the manifest needs {list(shape)}")
    return faults


def _shapes(tensors: Sequence[_Tensor]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in tensors}


def _message_class() -> type:
    file = descriptor_pb2.FileDescriptorProto(name="safelight/internal/model_config.proto", package=_PACKAGE)
    tensor = file.message_type.add(name="Tensor")
    tensor.field.add(name="name", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
    tensor.field.add(name="dims", number=4, type=_FIELD.TYPE_INT64, label=_FIELD.LABEL_REPEATED)
    config = file.message_type.add(name="ModelConfig")
    config.field.add(name="max_batch_size", number=4, type=_FIELD.TYPE_INT32, label=_FIELD.LABEL_OPTIONAL)
    for name, number in (("input", 5), ("output", 6)):
        config.field.add(
            name=name,
            number=number,
            type=_FIELD.TYPE_MESSAGE,
            label=_FIELD.LABEL_REPEATED,
            type_name=f".{_PACKAGE}.Tensor",
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.ModelConfig"))


_MESSAGE = _message_class()
