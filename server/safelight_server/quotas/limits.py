"""The limits of tenants, from the operator's file.

The file is one JSON object:

    {"default": {"requests": {"per_s": 5, "burst": 20}, "compute_s": {"per_s": 0.5, "burst": 60}},
     "tenants": {"studio": {"requests": {"per_s": 50, "burst": 200}}, "lab": {"compute_s": null}}}

A limit that a tenant's entry leaves out is that of `default`. There is no limit where
the value is null, or `default` leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight_server.coordination.buckets import BucketRate
from safelight_server.files import ConfigFileError, WatchedFile, faulty

TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
PerSecond = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]


class _Requests(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    per_s: PerSecond
    burst: Annotated[float, Field(ge=1, le=1e9, allow_inf_nan=False)]


class _ComputeSeconds(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    per_s: PerSecond
    burst: Annotated[float, Field(ge=0.001, le=1e9, allow_inf_nan=False)]


class _Limits(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    requests: _Requests | None = None
    compute_s: _ComputeSeconds | None = None


class _LimitsFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    default: _Limits = _Limits()
    tenants: dict[TenantName, _Limits] = {}


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """The limits of a tenant; None: no limit.

    Attributes:
        requests: requests a second, and how many at once.
        compute_s: seconds of compute a second, and how many at once.
    """

    requests: BucketRate | None = None
    compute_s: BucketRate | None = None


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """The limits of all tenants: `tenants` by name, `default` for all others."""

    default: TenantLimits
    tenants: dict[str, TenantLimits]

    def of(self, tenant: str) -> TenantLimits:
        """The limits of a tenant."""
        return self.tenants.get(tenant, self.default)


def watch(path: Path) -> WatchedFile[QuotaLimits]:
    """The limits of a quota file, which follow its changes.

    Raises:
        ConfigFileError: the file cannot be used.
    """
    return WatchedFile(path, lambda data: parse(path, data), "quotas")


def parse(path: Path, data: bytes) -> QuotaLimits:
    """Reads the content of a quota file.

    Raises:
        ConfigFileError: the file cannot be used; the error lists all faults.
    """
    try:
        found = _LimitsFile.model_validate_json(data)
    except ValidationError as error:
        raise _faulty(path, error) from None
    tenants = {
        name: _rates(found.default.model_copy(update={field: getattr(own, field) for field in own.model_fields_set}))
        for name, own in found.tenants.items()
    }
    return QuotaLimits(_rates(found.default), tenants)


def _rates(limits: _Limits) -> TenantLimits:
    return TenantLimits(_rate(limits.requests), _rate(limits.compute_s))


def _rate(limit: _Requests | _ComputeSeconds | None) -> BucketRate | None:
    return None if limit is None else BucketRate(limit.per_s, limit.burst)


def _faulty(path: Path, error: ValidationError) -> ConfigFileError:
    return faulty(path, [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()])
