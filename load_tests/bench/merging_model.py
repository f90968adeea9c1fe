"""A model of Triton's Python backend for `merging.py`: sleeps base + rows * row, and returns a tenth of its sample.

Triton hands it the requests that its dynamic batcher has merged.
"""

from __future__ import annotations

import json
import time
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Triton's interface of a Python model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the cost curve from the configuration."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._base_s, self._row_s = (float(parameters[name]["string_value"]) / 1e3 for name in ("base_ms", "row_ms"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer for each request."""
        samples = [pb_utils.get_input_tensor_by_name(request, "sample").as_numpy() for request in requests]
        time.sleep(self._base_s + self._row_s * sum(len(sample) for sample in samples))
        outputs = [pb_utils.Tensor("prediction", sample * sample.dtype.type(-0.1)) for sample in samples]
        return [pb_utils.InferenceResponse([output]) for output in outputs]
