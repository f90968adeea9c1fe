"""Reads the safetensors format: a header in JSON with types, shapes and offsets, then the bytes of all tensors.

Without torch, and with bfloat16, which numpy does not have (record 0032).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from safelight_server.domain.tensors import FloatArray

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 << 20
TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


class SafetensorsError(Exception):
    """A file is no safetensors file, or has a type that is not read; the message says what is wrong."""


def parse(data: bytes) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """The tensors of a file as float32, by name, and its metadata.

    Raises:
        SafetensorsError: it is cut off or malformed, or a tensor is no floating-point one.
    """
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, len(data)):
        raise SafetensorsError("is no safetensors file")
    try:
        header: dict[str, Any] = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
        metadata = header.pop("__metadata__", {})
        body = memoryview(data)[LENGTH_BYTES + length :]
        return {name: _tensor(name, entry, body) for name, entry in header.items()}, dict(metadata)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise SafetensorsError("is no safetensors file") from None


def _tensor(name: str, entry: Mapping[str, Any], body: memoryview) -> FloatArray:
    dtype, shape, (begin, end) = entry["dtype"], [int(size) for size in entry["shape"]], entry["data_offsets"]
    if dtype not in TYPES:
        raise SafetensorsError(f"has {name} as {dtype}; {', '.join(TYPES)} can be read")
    stored = np.dtype(TYPES[dtype])
    if not 0 <= begin <= end or min(shape, default=0) < 0 or end - begin != math.prod(shape) * stored.itemsize:
        raise ValueError(name)
    if end > len(body):
        raise SafetensorsError(f"is cut off: {end - len(body)} bytes of {name} are missing")
    values: npt.NDArray[Any] = np.frombuffer(body[begin:end], stored).reshape(shape)
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
