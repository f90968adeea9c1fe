"""Reads the metadata of a trigger in a KEDA ScaledObject."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight_server.scaler.demand import WAIT_S, Policy

ADDRESS = "scalerAddress"
"""A key of KEDA's own, which the metadata has too."""


class TriggerError(Exception):
    """The metadata is wrong; the message names each key and what it must be."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """The parsed metadata of a trigger.

    Attributes:
        selector: label matchers of its replicas' series.
        use_forecast: whether the forecast counts.
    """

    selector: str
    policy: Policy
    use_forecast: bool


class _Metadata(BaseModel):
    """The keys, in KEDA's style. All values come as text."""

    model_config = ConfigDict(extra="forbid")

    selector: str = ""
    instances: Annotated[int, Field(ge=1, le=1024)] = 1
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    minReplicas: Annotated[int, Field(ge=0, le=10_000)] = 0  # noqa: N815
    maxReplicas: Annotated[int, Field(ge=1, le=10_000)] = 100  # noqa: N815
    waitInteractive: Annotated[float, Field(gt=0)] = WAIT_S["interactive"]  # noqa: N815
    waitStandard: Annotated[float, Field(gt=0)] = WAIT_S["standard"]  # noqa: N815
    waitBatch: Annotated[float, Field(gt=0)] = WAIT_S["batch"]  # noqa: N815
    forecast: bool = True


def trigger(metadata: Mapping[str, str]) -> Trigger:
    """Parses the metadata of a trigger.

    Raises:
        TriggerError: a key is unknown or a value out of its bounds.
    """
    try:
        read = _Metadata.model_validate({key: value for key, value in metadata.items() if key != ADDRESS})
    except ValidationError as error:
        faults = [f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors(include_url=False)]
        raise TriggerError(f"metadata of the trigger: {'; '.join(faults)}") from error
    if read.minReplicas > read.maxReplicas:
        raise TriggerError("metadata of the trigger: minReplicas must be at most maxReplicas")
    wait_s = {"interactive": read.waitInteractive, "standard": read.waitStandard, "batch": read.waitBatch}
    policy = Policy(read.instances, read.utilization, wait_s, read.minReplicas, read.maxReplicas)
    return Trigger(read.selector, policy, read.forecast)
