"""Runs the components on NVIDIA Triton servers, one batched call per step.

    runtime.py        the `Runtime`: which server runs a call, what a failure means, probes in the background
    endpoints.py      pure: least outstanding work, ejection, probes with backoff
    server.py         one server: probes it, calls it over shared memory or gRPC
    shared_memory.py  regions that a server writes into, and when they may be used again
    client.py         one gRPC channel; failures told apart
    models.py         which Triton model is which component, and whether the server's is ours

Triton's protocol and tritonclient stay inside this package.
"""

from safelight_server.runtime.triton.runtime import TritonOptions, TritonRuntime

__all__ = ["TritonOptions", "TritonRuntime"]
