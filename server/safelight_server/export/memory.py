"""Measures how much memory each row of a call takes, in a process of its own that has nothing but ONNX Runtime.

`python -m safelight_server.export.memory MODEL INPUTS` prints the bytes; the
peak of its resident memory is read for a call of one row and for one of three.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safelight_server.export.source import ExportError

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

FEW, MANY = 1, 3
LEAST = 1 << 20


def row_bytes(model: Path, example: Mapping[str, Any]) -> int:
    """Bytes that one more row of a call takes, rounded up; 0 if this system cannot measure it.

    Args:
        example: the inputs, as arrays or torch tensors of two rows.

    Raises:
        ExportError: the model cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        arrays: dict[str, Any] = {name: np.asarray(tensor) for name, tensor in example.items()}
        np.savez(inputs, **arrays)
        command = [sys.executable, "-m", __name__, str(model), str(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise ExportError(f"{model.parent.parent.name} cannot be run: {done.stderr.strip().splitlines()[-1:]}")
    measured = int(done.stdout)
    return notch(measured) if measured >= 0 else 0


def torch_row_bytes(module: Any, example: Mapping[str, Any]) -> int:
    """Like `row_bytes`, of a torch module in this process, on the CPU in float32; at least what a row's inputs take."""
    peaks = []
    for rows in (FEW, FEW, MANY):  # the first call also fills caches
        batch = {name: tensor[[0] * rows] for name, tensor in example.items()}
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            return 0
        module(**batch)
        peaks.append(_peak_bytes())
    brought = sum(tensor[0].numel() * tensor.element_size() for tensor in example.values())
    return notch(max(brought, (peaks[2] - peaks[1]) // (MANY - FEW)))


def notch(num_bytes: int) -> int:
    """Rounds up to an eighth of a power of two, at least a mebibyte, so that measuring again gives the same number."""
    step = max(LEAST, 1 << max(0, num_bytes.bit_length() - 4))
    return max(LEAST, -(-num_bytes // step) * step)


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}


def _measure(model: str, inputs: str) -> int:
    import onnxruntime  # here, so that the exporter's own process keeps its memory for torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # so that what a call takes is given back
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with np.load(inputs) as arrays:
        given = {name: arrays[name] for name in arrays}
    peaks = []
    for rows in (FEW, FEW, MANY):  # the first call also fills caches
        batch = {name: np.concatenate([array] * rows)[:rows] for name, array in given.items()}
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            return -1
        session.run(None, batch)
        peaks.append(_peak_bytes())
    return max(0, peaks[2] - peaks[1]) // (MANY - FEW)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
