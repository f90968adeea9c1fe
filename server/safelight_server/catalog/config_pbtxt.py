"""Reads a model's `config.pbtxt` (Triton's model configuration) and compares its shapes with those of the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by tensor name, without the row axis; -1 is any size."""


class ConfigError(Exception):
    """A config.pbtxt is missing or is not in protobuf's text format; the message names the file."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The parts of a model configuration that the server uses.

    Attributes:
        max_rows: largest batch, Triton's max_batch_size.
    """

    max_rows: int
    inputs: Shapes
    outputs: Shapes


def read(file: Path) -> ModelConfig:
    """Reads one config.pbtxt.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        # A repository may be configured for a newer Triton than this tritonclient, so unknown fields are skipped.
        config = text_format.Parse(file.read_text(), pb.ModelConfig(), allow_unknown_field=True)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ConfigError(f"{file}: {error}") from None
    inputs, outputs = ({tensor.name: tuple(tensor.dims) for tensor in side} for side in (config.input, config.output))
    return ModelConfig(config.max_batch_size, inputs, outputs)


def mismatches(found: Shapes, wanted: Shapes) -> list[str]:
    """Names each tensor of `wanted` that is absent from `found` or has another shape there."""
    faults = []
    for name, shape in wanted.items():
        dims = found.get(name)
        if dims is None:
            faults.append(f"{name} is missing")
        elif len(dims) != len(shape) or any(a != b for a, b in zip(dims, shape, strict=True) if -1 not in (a, b)):
            faults.append(f"{name} is {list(dims)}, the manifest needs {list(shape)}")
    return faults
