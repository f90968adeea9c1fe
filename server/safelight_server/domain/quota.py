"""What a tenant has left of its quotas at a moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BucketView:
    """A token bucket at a moment.

    Attributes:
        per_s: tokens that come back each second.
        burst: most tokens that it holds.
        tokens: the tokens that are left; negative in debt.
        available_after_s: seconds until this bucket admits a request; 0: now.
        full_after_s: seconds until it is full, if nothing is taken.
    """

    per_s: float
    burst: float
    tokens: float
    available_after_s: float
    full_after_s: float


@dataclass(frozen=True, slots=True)
class QuotaView:
    """The quotas of a tenant at a moment; None: no limit. `compute_s`: seconds of compute."""

    tenant: str
    requests: BucketView | None
    compute_s: BucketView | None
