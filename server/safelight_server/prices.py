"""Prices of machines, from the operator's file, and the price of a second of compute on one of them.

The file is TOML:

    currency = "USD"

    [instance_types."g5.xlarge"]
    per_hour = 1.006
    instances = 1        # runtime instances: calls that run at once on such a machine
    utilization = 0.6    # share of their time that computes; the price of the whole hour is spread over it
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight_server.files import ConfigFileError, faulty, read_regular_file

NANO = 1_000_000_000


class MachinePrice(BaseModel):
    """A kind of machine.

    Attributes:
        per_hour: price in units of the currency.
        instances: runtime instances of such a machine.
        utilization: share of instance time that computes, over which the price of a whole hour is spread.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    per_hour: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    instances: Annotated[int, Field(ge=1, le=256)] = 1
    utilization: Annotated[float, Field(gt=0, le=1)] = 1.0

    @property
    def per_compute_s(self) -> float:
        """The price of a second of one instance, in units of the currency."""
        return self.per_hour / 3600 / self.instances / self.utilization


class PriceTable(BaseModel):
    """All prices of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    instance_types: Annotated[dict[str, MachinePrice], Field(min_length=1)]

    def machine(self, instance_type: str, where: str) -> MachinePrice:
        """The price of a kind of machine. `where` names the setting or option with the kind, for the error.

        Raises:
            ConfigFileError: the table does not have it.
        """
        if (found := self.instance_types.get(instance_type)) is None:
            raise ConfigFileError(
                f"{where}: {instance_type!r} is none of the instance types {sorted(self.instance_types)}"
            )
        return found


@dataclass(frozen=True, slots=True)
class ComputePrice:
    """The price of compute on one server.

    Attributes:
        currency: ISO 4217.
        per_s: units of the currency for a second of an instance.
        machine_per_hour: units of the currency for the machine.
    """

    currency: str
    per_s: float
    machine_per_hour: float

    def of(self, compute_s: float) -> int:
        """The cost of `compute_s` seconds of compute, in billionths of a unit of the currency."""
        return round(compute_s * self.per_s * NANO)


def read_prices(path: Path) -> PriceTable:
    """The price table of a file.

    Raises:
        ConfigFileError: the file cannot be used; the error lists all faults.
    """
    try:
        return PriceTable.model_validate(tomllib.loads(read_regular_file(path).decode()))
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path}: is not valid TOML: {error}") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise faulty(path, faults) from None


def compute_price(path: Path, instance_type: str) -> ComputePrice:
    """The price of compute on a kind of machine.

    Raises:
        ConfigFileError: the file cannot be used or does not have that kind.
    """
    table = read_prices(path)
    machine = table.machine(instance_type, "instance_type")
    return ComputePrice(table.currency, machine.per_compute_s, machine.per_hour)
