"""Safelight: text-to-image diffusion over gRPC, with a preview from the first denoising step on.

The packages, in the order in which a request passes them:

    cli, app                   the command line; building, serving and draining one server
    api, validation, wire      gRPC in, faults named by field, messages translated in both directions
    quotas                     how many requests a tenant may send and how much it may compute in a time
    generations                accepts a request, runs its outputs, remembers its outcome; ownership among replicas
    stream, preview            what a client receives, and the pictures of unfinished outputs
    engine, scheduler, sampler, runtime    which outputs share a call, the step's mathematics, and what executes models
    cache, catalog             results that are reused; the models and their files
    cluster, coordination, storage         replicas that share a Redis; leases and bills; memory, disk, Redis and S3
    domain, telemetry, settings, files     shared types; logs, metrics and traces; the operator's settings and files
"""

__version__ = "0.1.0"
"""The version of the server; `pyproject.toml` reads it here."""
