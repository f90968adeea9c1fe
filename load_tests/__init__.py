"""Scenarios for ghz (`ghz/`), users for locust (`locust/`), benchmarks (`bench/`), soak test, calibration of caches.

docs/load-testing.md is about `ghz/` and `locust/`, which need a running server.

`make bench` runs all parts of `bench/`, `make bench ONLY=latency` one of them;
docs/benchmarks.md says how to read the results. Each part has a `Plan` of how
much to measure, for example `throughput.py`, `latency.py`, `scheduler.py` and
`watchers.py`. The parts share `runner.py` (tables, JSON, machine facts),
`processes.py` (servers and clients in child processes), `clients.py` (Safelight
clients), `arrivals.py` (closed and open loops), `bare.py` (the model without a
server) and `peers/` (other servers to compare with).
"""

import os

# Before any module here imports onnxruntime or huggingface_hub, which otherwise report their use to their makers.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
