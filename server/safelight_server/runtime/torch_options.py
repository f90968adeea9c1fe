"""What an operator chooses for the `torch` runtime, and how its numerics are named. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from safelight_server.sampler import VERSION as SAMPLER_VERSION

TOLERANCES = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.05}
"""Batch tolerances where the operator names none: for float32 ten times what was seen on CPUs, else a few roundings."""


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """How the `torch` runtime computes.

    Attributes:
        device: "auto" (all GPUs, or the CPU where there is none), or devices separated by commas: "cpu",
            "cuda:0,cuda:1".
        dtype: of weights and arithmetic: "float32", "float16" or "bfloat16".
        batch_tolerance: largest deviation of a batch from single rows, relative to the largest value of the result;
            None: by dtype.
        num_instances: calls that run at once; 0: one for each core, or for each GPU.
    """

    device: str = "auto"
    dtype: str = "float32"
    batch_tolerance: float | None = None
    num_instances: int = 0

    @property
    def tolerance(self) -> float:
        """The batch tolerance, chosen by dtype where the operator did not."""
        return TOLERANCES[self.dtype] if self.batch_tolerance is None else self.batch_tolerance

    def numerics_id(self, version: str, device: str) -> str:
        """Names all that decides bits: libraries, device, dtype, batch equality (exact or within a tolerance), sampler.

        Args:
            version: of torch, and of the libraries that have the networks.

        With the tolerance in it, what was computed alone and what may have shared a batch never answer for one another.
        """
        equality = f"within:{self.tolerance:g}" if self.tolerance else "exact"
        return f"torch-{version}-{device}-{self.dtype}-{equality}-s{SAMPLER_VERSION}"
