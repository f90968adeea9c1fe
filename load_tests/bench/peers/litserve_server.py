"""The same ONNX sessions behind LitServe with request-level batching, as its documentation shows it.

A request waits for a batch of whole pictures and gets its pixels when the whole
batch is done: POST /predict {"prompt", "seed", "num_steps"} -> raw RGB.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import litserve
from safelight_server.catalog import catalog as catalogs
from starlette.responses import Response

from load_tests.bench.bare import BareLoop, Pixels

BATCH_SIZE = 8
BATCH_TIMEOUT_S = 0.05


class Icons(litserve.LitAPI):  # type: ignore[misc]  # LitServe has no types
    """LitServe's hooks, in the order in which it calls them."""

    def __init__(self, models: Path, num_threads: int) -> None:
        super().__init__(max_batch_size=BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S)
        self._models = models
        self._num_threads = num_threads

    def setup(self, device: str) -> None:
        """Called once in each worker."""
        self._loop = BareLoop(catalogs.load(self._models).get(""), self._num_threads)
        self._loop.develop(["warm up"], [0], 1)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe would take a type for a schema
        """The JSON body as it came."""
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the list of requests unchanged: the bare loop takes a list."""
        return inputs

    def predict(self, requests: list[dict[str, Any]]) -> list[Pixels]:
        """Develops one batch; all requests of this benchmark have the same number of steps."""
        steps = {request["num_steps"] for request in requests}
        if len(steps) != 1:
            raise ValueError("requests of one batch differ in their steps")
        prompts, seeds = [r["prompt"] for r in requests], [r["seed"] for r in requests]
        return self._loop.develop(prompts, seeds, steps.pop())

    def unbatch(self, output: list[Pixels]) -> list[Pixels]:
        """Returns the pictures unchanged: they are a list already."""
        return output

    def encode_response(self, output: Pixels) -> Response:
        """Raw pixels: nothing to encode."""
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    api = Icons(options.models, options.threads)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=options.workers, timeout=False)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    main()
