"""The `triton` runtime: runs components on NVIDIA Triton servers, one batched inference call per step.

    runtime.py        implements `Runtime`: picks the server of a call, handles failures, probes in the background
    endpoints.py      pure load balancing: least outstanding work, ejection, probes with backoff
    server.py         one server: probes it, calls it over shared memory or gRPC
    shared_memory.py  the shared-memory regions of one server, and when each may be used again
    client.py         one gRPC channel to a server; classifies failures
    models.py         which Triton model is which component, and whether the server has the expected one

Triton's protocol and tritonclient are used only inside this package.
"""

from safelight_server.runtime.triton.runtime import TritonOptions, TritonRuntime

__all__ = ["TritonOptions", "TritonRuntime"]
