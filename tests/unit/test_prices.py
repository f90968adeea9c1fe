"""Prices: what a second of compute costs, and tables that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from safelight_server.files import ConfigFileError
from safelight_server.prices import compute_price, read_prices

TABLE = """
currency = "USD"
[instance_types."g5.xlarge"]
per_hour = 3.6
instances = 2
utilization = 0.5
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "prices.toml"
    path.write_text(text)
    return path


def test_a_second_of_compute_pays_its_part_of_the_hour_and_of_what_stands_idle(tmp_path: Path) -> None:
    price = compute_price(written(tmp_path, TABLE), "g5.xlarge")
    assert price.per_s == pytest.approx(3.6 / 3600 / 2 / 0.5)
    assert price.machine_per_hour == 3.6
    assert price.of(2.5) == 2_500_000, "billionths"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("currency = ", "is not valid TOML"),
        ('currency = "usd"\n[instance_types.a]\nper_hour = 1', "currency"),
        ('currency = "USD"', "instance_types"),
        ('currency = "USD"\n[instance_types.a]\nper_hour = -1', "instance_types.a.per_hour"),
        ('currency = "USD"\n[instance_types.a]\nper_hour = 1\nutilisation = 1', "instance_types.a.utilisation"),
        ('currency = "USD"\n[instance_types.a]\nper_hour = nan', "instance_types.a.per_hour"),
    ],
)
def test_a_table_that_cannot_be_used_names_the_field(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigFileError, match=fault):
        read_prices(written(tmp_path, text))


def test_an_unknown_machine_is_told_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match=r"'p4d' is none of the instance types \['g5.xlarge'\]"):
        compute_price(written(tmp_path, TABLE), "p4d")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match="No such file"):
        read_prices(tmp_path / "none.toml")
