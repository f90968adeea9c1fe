"""Triton's `onnxruntime` backend in Python: it serves the model repository where NVIDIA's own backend is not available.

It takes the config.pbtxt that NVIDIA's backend takes (intra_op_thread_count,
inter_op_thread_count, execution_mode, optimization.graph.level, output
selection, reshape by Triton's core) and runs on the CPU. Sessions are made as
`safelight_server.runtime.onnx` makes them, so that both give the same bits
(`tests/triton/test_backend.py`). The requests of a batch are one session call;
if it fails, each request is run by itself, so that only a bad one fails.

Triton abandons a call when its stub does not respond for a second (it was
frozen, or got no CPU time), but takes the stub's late answer for the
answer to the next call. So a stub whose call was abandoned ends its process.

It runs in Triton's Python stub and imports nothing from this project.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Before the import: see safelight_server.runtime.onnx. `serve` sets it as well; this backend also runs without it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime
import triton_python_backend_utils as triton
from onnxruntime.capi import onnxruntime_pybind11_state as ort

LEVELS = {
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
"""Meaning of optimization.graph.level, as in NVIDIA's backend."""
MODES = {"0": onnxruntime.ExecutionMode.ORT_SEQUENTIAL, "1": onnxruntime.ExecutionMode.ORT_PARALLEL}
_TRANSIENT = (ort.RuntimeException, ort.Fail, ort.EngineError, ort.EPFail)
_PERMANENT = (ValueError, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented)

Tensors = dict[str, np.ndarray]


class TritonPythonModel:
    """One model instance: an ONNX Runtime session in its own process. Triton calls its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model and runs one row of zeros, so that the first request is not slower than the others.

        A model with open dimensions is not run: which sizes it takes is not known here. A `model_warmup` says it.

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
        if all(int(dim) >= 0 for tensor in config["input"] for dim in tensor["dims"]):
            self._session.run(self._outputs, {tensor["name"]: _zeros(tensor) for tensor in config["input"]})
        self._messages = Messages(*_shared_memory())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns one response for each request, in their order; cancelled requests are not computed."""
        self._messages.end_if_given_up()  # first, since Triton has forgotten the requests of an abandoned call
        live = [request for request in requests if not request.is_cancelled()]
        answers = iter(self._answers(live))
        responses = [next(answers) if request in live else _cancelled() for request in requests]
        self._messages.end_if_given_up()
        return responses

    def finalize(self) -> None:
        """Frees the session."""
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


class Messages:
    """Reads the ring buffer in shared memory by which Triton sends messages to this stub.

    Its layout is that of IPCControlShm and MessageQueueShm in python_backend r24.10.

    Invariant: after it has sent a call, Triton sends nothing before the answer, unless it has abandoned the call.

    Args:
        region: name of the shared memory region.
        control: offset of IPCControlShm in the region, in bytes.

    Raises:
        TritonModelException: there is no such ring buffer: this version of Triton has another memory layout.
    """

    OWNER_BYTES, QUEUE_AT, LENGTH_AT, ENDS_AT = 16, 88, 104, 120
    LENGTH = 1000

    def __init__(self, region: str, control: int) -> None:
        with Path("/dev/shm", region).open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        [queue] = struct.unpack_from("q", self._memory, control + self.OWNER_BYTES + self.QUEUE_AT)
        self._at = queue + self.OWNER_BYTES
        [length] = struct.unpack_from("Q", self._memory, self._at + self.LENGTH_AT)
        if length != self.LENGTH or self.waiting:
            raise triton.TritonModelException("this Triton keeps its messages in another way: see onnxruntime/model.py")

    @property
    def waiting(self) -> bool:
        """Whether there are messages that the stub has not read."""
        head, tail = struct.unpack_from("ii", self._memory, self._at + self.ENDS_AT)
        return bool(head != tail)

    def end_if_given_up(self) -> None:
        """Ends the process, and with it the server, if Triton no longer waits for the call that is being answered."""
        if self.waiting:
            print("onnxruntime: Triton has given up a call: ending its stub", file=sys.stderr, flush=True)
            os._exit(1)


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


def _shared_memory() -> tuple[str, int]:
    """The stub's shared memory region and the offset of IPCControlShm in it, from the stub's command line."""
    words = Path("/proc/self/cmdline").read_text().split("\0")
    return words[2], int(words[7])


def _zeros(tensor: dict[str, Any]) -> np.ndarray:
    """One row of zeros for an input of the session."""
    reshape = tensor.get("reshape")
    dims = tensor["dims"] if reshape is None else reshape["shape"]
    return np.zeros((1, *(int(dim) for dim in dims)), triton.triton_string_to_numpy(tensor["data_type"]))


def _responses(results: Tensors, feeds: list[Tensors], wanted: list[set[str]]) -> list[Any]:
    """Makes a response for each request from its rows of the joint call's results."""
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
    """A new error for each response, since Triton frees it with the response."""
    return triton.InferenceResponse(error=triton.TritonError("cancelled by the client", triton.TritonError.CANCELLED))
