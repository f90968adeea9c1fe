"""Writes small ONNX networks without the package onnx, which the server's own environment lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

FLOAT, INT64, OPSET, IR_VERSION = 1, 7, 13, 8
INT, GRAPH, INTS = 2, 5, 7
"""Kinds of attributes."""

Shape = tuple[int | str, ...]
TOKEN_IDS = "input_ids"
"""The tensor that holds int64; all others are float32."""


def network(
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    nodes: Sequence[bytes],
    constants: Mapping[str, np.ndarray[Any, Any]],
) -> bytes:
    """An ONNX file; an axis with a name is free."""
    return field(1, IR_VERSION) + field(7, graph(nodes, outputs, inputs, constants)) + field(8, field(2, OPSET))


def graph(
    nodes: Sequence[bytes],
    outputs: Mapping[str, Shape],
    inputs: Mapping[str, Shape] = MappingProxyType({}),
    constants: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
) -> bytes:
    """A GraphProto, which a node may have as an attribute: a branch, which sees what is around it."""
    made = b"".join(field(1, one) for one in nodes) + field(2, "graph")
    made += b"".join(field(5, _tensor(name, values)) for name, values in constants.items())
    made += b"".join(field(11, _value(name, shape)) for name, shape in inputs.items())
    return made + b"".join(field(12, _value(name, shape)) for name, shape in outputs.items())


def node(kind: str, inputs: Sequence[str], output: str, **attributes: int | list[int] | bytes) -> bytes:
    """A NodeProto with one output; bytes are a `graph`."""
    made = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)
    for name, value in attributes.items():
        if isinstance(value, bytes):
            of, kind_of_value = field(6, value), GRAPH
        elif isinstance(value, int):
            of, kind_of_value = field(3, value), INT
        else:
            of, kind_of_value = b"".join(field(8, one) for one in value), INTS
        made += field(5, field(1, name) + of + field(20, kind_of_value))
    return made


def field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def _value(name: str, shape: Shape) -> bytes:
    dims = b"".join(field(1, field(1, axis) if isinstance(axis, int) else field(2, axis)) for axis in shape)
    return field(1, name) + field(2, field(1, field(1, INT64 if name == TOKEN_IDS else FLOAT) + field(2, dims)))


def _tensor(name: str, values: np.ndarray[Any, Any]) -> bytes:
    dims = b"".join(field(1, axis) for axis in values.shape)
    kind = {"float32": FLOAT, "int64": INT64}[str(values.dtype)]
    return dims + field(2, kind) + field(8, name) + field(9, values.tobytes())
