"""Benchmarks: `make bench`, `make bench ONLY=latency`. docs/benchmarks.md says how to read them.

The parts, each with a `Plan` of how much to measure: `throughput.py` (pictures
per second against the bare loop), `latency.py` (first pixels under Poisson
arrivals, against peers), `scheduler.py` (steps per second against the ideal),
`watchers.py` (thousands of streams). What they share: `runner.py` (tables,
JSON, machine facts), `processes.py` (servers and clients of their own),
`clients.py` (who asks Safelight), `arrivals.py` (open loops), `bare.py` (the
sessions without a server), `peers/` (other servers).
"""

import os

# Before any module here imports onnxruntime or huggingface_hub, which otherwise report their use to their makers.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
