"""Triton's `onnxruntime` backend on Python: what serves the repository where NVIDIA's own backend is not to be had.

It takes the config.pbtxt that NVIDIA's backend takes (intra_op_thread_count,
inter_op_thread_count, execution_mode, optimization.graph.level, output
selection, reshape by Triton's core) and runs on the CPU. Sessions are made as
`safelight_server.runtime.onnx` makes them, so that both give the same bits
(`tests/triton/test_backend.py`). The requests of a batch are one session call;
one that fails is run request by request, so that a bad one fails alone.

Runs in Triton's Python stub: no import from this project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton
from onnxruntime.capi import onnxruntime_pybind11_state as ort

LEVELS = {
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
"""Of optimization.graph.level, as NVIDIA's backend reads it."""
MODES = {"0": onnxruntime.ExecutionMode.ORT_SEQUENTIAL, "1": onnxruntime.ExecutionMode.ORT_PARALLEL}
_TRANSIENT = (ort.RuntimeException, ort.Fail, ort.EngineError, ort.EPFail)
_PERMANENT = (ValueError, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented)

Tensors = dict[str, np.ndarray]


class TritonPythonModel:
    """One instance: one session in one process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model and runs one row, so that the first request finds it warm.

        Raises:
            TritonModelException: the configuration or the model cannot be used.
        """
        config = json.loads(args["model_config"])
        if config["max_batch_size"] < 1:
            raise triton.TritonModelException(f"{args['model_name']}: max_batch_size must be at least 1")
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        folder = Path(args["model_repository"]) / args["model_version"]
        file = folder / (config.get("default_model_filename") or "model.onnx")
        self._session = onnxruntime.InferenceSession(file, options(config), providers=["CPUExecutionProvider"])
        warm = {tensor["name"]: _zeros(tensor) for tensor in config["input"]}
        self._session.run(self._outputs, warm)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in their order; cancelled ones are not computed."""
        live = [request for request in requests if not request.is_cancelled()]
        answers = iter(self._answers(live))
        return [next(answers) if request in live else _cancelled() for request in requests]

    def finalize(self) -> None:
        """Lets the session go."""
        del self._session

    def _answers(self, requests: list[Any]) -> list[Any]:
        if not requests:
            return []
        feeds = [
            {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        wanted = [set(request.requested_output_names()) for request in requests]
        try:
            return _responses(self._run(feeds, set().union(*wanted)), feeds, wanted)
        except (*_TRANSIENT, *_PERMANENT) as error:
            if len(requests) == 1:
                return [_failed(error)]
        return [answer for request in requests for answer in self._answers([request])]

    def _run(self, feeds: list[Tensors], wanted: set[str]) -> Tensors:
        """One session call over the rows of all `feeds`."""
        names = [name for name in self._outputs if name in wanted]
        feed = feeds[0]
        if len(feeds) > 1:
            feed = {name: np.concatenate([feed[name] for feed in feeds]) for name in self._inputs}
        return dict(zip(names, self._session.run(names, feed), strict=True))


def options(config: dict[str, Any]) -> onnxruntime.SessionOptions:
    """Session options of a model configuration."""
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    graph = (config.get("optimization") or {}).get("graph") or {}
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = int(parameters.get("intra_op_thread_count", "0"))
    chosen.inter_op_num_threads = int(parameters.get("inter_op_thread_count", "0"))
    chosen.execution_mode = MODES[parameters.get("execution_mode", "0")]
    chosen.graph_optimization_level = LEVELS[int(graph.get("level", 0))]
    chosen.log_severity_level = 3
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def _zeros(tensor: dict[str, Any]) -> np.ndarray:
    """One row of an input as the session takes it; open dimensions become 1."""
    reshape = tensor.get("reshape")
    dims = tensor["dims"] if reshape is None else reshape["shape"]
    return np.zeros((1, *(max(1, int(dim)) for dim in dims)), triton.triton_string_to_numpy(tensor["data_type"]))


def _responses(results: Tensors, feeds: list[Tensors], wanted: list[set[str]]) -> list[Any]:
    """Cuts the rows of each request out of the results of the joined call."""
    answers, first = [], 0
    for feed, names in zip(feeds, wanted, strict=True):
        last = first + len(next(iter(feed.values())))
        tensors = [triton.Tensor(name, array[first:last]) for name, array in results.items() if name in names]
        answers.append(triton.InferenceResponse(tensors))
        first = last
    return answers


def _failed(error: Exception) -> Any:
    code = triton.TritonError.INTERNAL if isinstance(error, _TRANSIENT) else triton.TritonError.INVALID_ARG
    return triton.InferenceResponse(error=triton.TritonError(str(error), code))


def _cancelled() -> Any:
    """A new error for each response: Triton frees it with the response."""
    return triton.InferenceResponse(error=triton.TritonError("cancelled by the client", triton.TritonError.CANCELLED))
