"""`safelight bills`: sums of bills. Reads the bills in Redis itself, so that no server need run.

Bills name tenants, so reading them needs the key file that sealed them; a caller's API key is not enough.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from safelight_server.cluster.bills import Bill, read_bills
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.prices import NANO, ComputePrice, compute_price
from safelight_server.storage.base import StoreError
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.clock import SharedClock
from safelight_server.storage.keyring import Keyring, KeyringError
from safelight_server.storage.redis import RedisConnection
from safelight_server.storage.sealed import Sealer
from safelight_server.telemetry import configure_logging

TIMEOUT_S = 5.0
"""How long one read of Redis may take."""
KINDS = ("tenant", "model_revision", "disposition")
"""The facts by which bills can be grouped, in the order of the columns."""
SUMS = ("pictures", "rows", "steps", "compute_s")
HEADINGS = {"model_revision": "model", "disposition": "began", "compute_s": "compute"}


class BillsError(Exception):
    """The bills cannot be read, or not all of them; the message says why."""


class BillFormat(StrEnum):
    """How the sums are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


@dataclass(slots=True)
class BilledSum:
    """The sum of a group of bills. Facts by which bills are not grouped are empty."""

    tenant: str
    model_revision: str
    disposition: str
    pictures: int = 0
    rows: int = 0
    steps: int = 0
    compute_s: float = 0.0

    def add(self, bill: Bill) -> None:
        """Adds a bill."""
        self.pictures += 1
        self.rows += bill.rows
        self.steps += bill.steps
        self.compute_s += bill.compute_s


def bills(
    redis_url: Annotated[str, typer.Option(envvar="SAFELIGHT_REDIS_URL", help="Redis of the replicas.")],
    cache_key_file: Annotated[Path, typer.Option(envvar="SAFELIGHT_CACHE_KEY_FILE", help="Keys that seal the bills.")],
    since: Annotated[datetime | None, typer.Option(help="Begin (UTC); without it all bills count.")] = None,
    until: Annotated[datetime | None, typer.Option(help="End (UTC), exclusive.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only the bills of this tenant.")] = None,
    by: Annotated[
        str, typer.Option(help="What to group by, separated by commas: tenant, model_revision, disposition.")
    ] = ",".join(KINDS),
    price_file: Annotated[
        Path | None, typer.Option(envvar="SAFELIGHT_PRICE_FILE", help="Prices of machines: adds the cost.")
    ] = None,
    instance_type: Annotated[
        str, typer.Option(envvar="SAFELIGHT_INSTANCE_TYPE", help="The machine in the price file that computed.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV with a header.")] = False,
) -> None:
    """Sum up bills by tenant, model and where the work began (docs/operations/billing.md)."""
    group_by = tuple(name.strip() for name in by.split(","))
    if unknown := [name for name in group_by if name not in KINDS]:
        raise BillsError(f"--by {', '.join(unknown)}: must be of {', '.join(KINDS)}")
    if (price_file is None) != (not instance_type):
        raise BillsError("--price-file and --instance-type go together")
    price = None if price_file is None else compute_price(price_file, instance_type)
    if as_json and as_csv:
        raise BillsError("--json, --csv: give one of them")
    if since is not None and until is not None and since >= until:
        raise BillsError("--until: must be after --since")
    configure_logging("console", "warning")
    sums, num_sealed = uvloop.run(_add_up(redis_url, cache_key_file, since, until, tenant, group_by))
    _print(sums, group_by, price, BillFormat.JSON if as_json else BillFormat.CSV if as_csv else BillFormat.TABLE)
    if num_sealed:
        raise BillsError(f"{num_sealed} bills are missing above: --cache-key-file {cache_key_file} does not open them")


async def _add_up(
    redis_url: str,
    key_file: Path,
    since: datetime | None,
    until: datetime | None,
    tenant: str | None,
    group_by: Sequence[str],
) -> tuple[list[BilledSum], int]:
    """Returns the sums in the order of their groups, and the number of bills that cannot be opened."""
    clock = SharedClock()
    try:
        sealer = Sealer(Keyring.load(key_file), clock.now)
        connection = RedisConnection(redis_url, TIMEOUT_S, clock)
    except KeyringError as error:
        raise BillsError(f"--cache-key-file / SAFELIGHT_CACHE_KEY_FILE: {error}") from None
    except ValueError as error:
        raise BillsError(f"--redis-url / SAFELIGHT_REDIS_URL: {error}") from None
    sums: dict[tuple[str, str, str], BilledSum] = {}
    num_sealed = 0
    coordinator = RedisCoordinator(connection, Breaker("redis", TIMEOUT_S))
    since_ms = 0 if since is None else _unix_ms(since)
    until_ms = None if until is None else _unix_ms(until)
    try:
        async for bill in read_bills(coordinator, sealer, since_ms, until_ms):
            if bill is None:
                num_sealed += 1
            elif tenant in (None, bill.tenant):
                billed_tenant, model, began = (getattr(bill, name) if name in group_by else "" for name in KINDS)
                kind = billed_tenant, model, began
                sums.setdefault(kind, BilledSum(*kind)).add(bill)
    except StoreError as error:
        raise BillsError(f"--redis-url / SAFELIGHT_REDIS_URL: {error}") from None
    finally:
        await coordinator.close()
        await connection.close()
    return [sums[kind] for kind in sorted(sums)], num_sealed


def _unix_ms(moment: datetime) -> int:
    return int(moment.replace(tzinfo=UTC).timestamp() * 1000)


def _print(sums: Iterable[BilledSum], group_by: Sequence[str], price: ComputePrice | None, form: BillFormat) -> None:
    columns = [*(name for name in KINDS if name in group_by), *SUMS, *(() if price is None else ("cost", "currency"))]
    rows = []
    for group in sums:
        row = asdict(group) | {"compute_s": round(group.compute_s, 6)}
        if price is not None:
            row |= {"cost": price.of(group.compute_s) / NANO, "currency": price.currency}
        rows.append({name: row[name] for name in columns})
    if form is BillFormat.JSON:
        for row in rows:
            typer.echo(json.dumps(row))
    elif form is BillFormat.CSV:
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        table = Table(*(HEADINGS.get(name, name) for name in columns))
        for row in rows:
            shown = row | {"compute_s": f"{row['compute_s']:.1f} s"}
            if price is not None:
                shown["cost"] = f"{row['cost']:.6f}"
            table.add_row(*(str(shown[name]) for name in columns))
        Console().print(table)
