"""`safelight bills`: sums of bills, from Redis or from a table to which `safelight bills archive` copied them.

It reads the store itself, so that no server need run. Bills name tenants, so reading them in Redis needs the key file
that sealed them; a caller's API key is not enough. Those of the table are for whom IAM lets read it.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from safelight_server.cluster.bill_archive import ArchiveReport, BillArchive
from safelight_server.cluster.bills import Bill, read_bills
from safelight_server.cluster.ledger import Gap, Ledger
from safelight_server.coordination.redis import RedisCoordinator
from safelight_server.domain.caller import NAME, NAME_IN_WORDS
from safelight_server.prices import NANO, ComputePrice, compute_price
from safelight_server.storage.base import StoreError
from safelight_server.storage.breaker import Breaker
from safelight_server.storage.clock import SharedClock
from safelight_server.storage.dynamodb import DynamoTable, TableError
from safelight_server.storage.keyring import Keyring, KeyringError
from safelight_server.storage.redis import RedisConnection
from safelight_server.storage.sealed import Sealer
from safelight_server.telemetry import configure_logging

Given = TypeVar("Given")

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


bills = typer.Typer(invoke_without_command=True, subcommand_metavar="[archive]")

RedisUrl = Annotated[str | None, typer.Option(envvar="SAFELIGHT_REDIS_URL", help="Redis of the replicas.")]
CacheKeyFile = Annotated[
    Path | None, typer.Option(envvar="SAFELIGHT_CACHE_KEY_FILE", help="Keys that seal the bills in Redis.")
]


@bills.callback()
def sum_bills(
    context: typer.Context,
    redis_url: RedisUrl = None,
    cache_key_file: CacheKeyFile = None,
    table: Annotated[str | None, typer.Option(help="Read this table of DynamoDB, and not Redis (extra `aws`).")] = None,
    deployment: Annotated[
        str | None, typer.Option(help="Only the bills of this deployment; with --table, which may have several.")
    ] = None,
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
    if context.invoked_subcommand is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [_option(name) for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        if given:
            raise BillsError(f"{', '.join(given)}: must follow `{context.invoked_subcommand}`")
        return
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
    if deployment is not None and table is None:
        raise BillsError("--deployment: needs --table; Redis has the bills of one deployment")
    configure_logging("console", "warning")
    sums = Sums(group_by, tenant)
    since_ms = 0 if since is None else max(0, _unix_ms(since))
    until_ms = None if until is None else _unix_ms(until)
    gaps: list[Gap] = []
    if table is None:
        uvloop.run(
            _read_redis(
                _needed(redis_url, "redis_url"), _needed(cache_key_file, "cache_key_file"), since_ms, until_ms, sums
            )
        )
    else:
        sealer = None if cache_key_file is None else Sealer(_keyring(cache_key_file))
        gaps = _read_table(table, sealer, since_ms, until_ms, deployment, tenant, sums)
    _print(
        sums.sorted(), group_by, price, BillFormat.JSON if as_json else BillFormat.CSV if as_csv else BillFormat.TABLE
    )
    faults = [_gap_text(gap) for gap in gaps]
    if sums.num_sealed:
        opener = "no --cache-key-file" if cache_key_file is None else f"--cache-key-file {cache_key_file}"
        verb = "is given to open them" if cache_key_file is None else "does not open them"
        faults.append(f"{sums.num_sealed} bills are missing above: {opener} {verb}")
    if faults:
        raise BillsError("\n".join(faults))


@bills.command()
def archive(
    table: Annotated[str, typer.Option(envvar="SAFELIGHT_BILLS_TABLE", help="Table of DynamoDB, or its ARN.")],
    deployment: Annotated[
        str,
        typer.Option(
            envvar="SAFELIGHT_DEPLOYMENT",
            help="Name for the bills of this Redis; no other Redis may have it in the table.",
        ),
    ],
    redis_url: RedisUrl = None,
    cache_key_file: CacheKeyFile = None,
    log_format: Annotated[str, typer.Option(envvar="SAFELIGHT_LOG_FORMAT", help="console or json.")] = "console",
) -> None:
    """Copy the bills that are new in Redis to a table of DynamoDB, where they are kept (docs/operations/billing.md)."""
    if not re.fullmatch(NAME, deployment):
        raise BillsError(f"--deployment / SAFELIGHT_DEPLOYMENT: must be {NAME_IN_WORDS}")
    configure_logging(log_format, "warning")
    url, key_file = _needed(redis_url, "redis_url"), _needed(cache_key_file, "cache_key_file")
    report = uvloop.run(_archive(url, key_file, table, deployment))
    typer.echo(f"copied {report.copied} bills to {table}")
    faults = [_gap_text(gap) for gap in report.gaps]
    if report.sealed:
        of_keys = ", ".join(f"{number} of key {key}" for key, number in sorted(report.sealed.items()))
        faults.append(
            f"{sum(report.sealed.values())} bills were copied encrypted: --cache-key-file {key_file} does not open "
            f"them ({of_keys})"
        )
    if faults:
        raise BillsError("\n".join(faults))


class Sums:
    """Sums of bills by what they are grouped by.

    Attributes:
        num_sealed: bills that could not be opened.
    """

    def __init__(self, group_by: Sequence[str], tenant: str | None) -> None:
        self.num_sealed = 0
        self._group_by = group_by
        self._tenant = tenant
        self._sums: dict[tuple[str, str, str], BilledSum] = {}

    def add(self, bill: Bill | None) -> None:
        """Adds a bill, unless it is another tenant's. None: one that could not be opened."""
        if bill is None:
            self.num_sealed += 1
        elif self._tenant in (None, bill.tenant):
            tenant, model, began = (getattr(bill, name) if name in self._group_by else "" for name in KINDS)
            kind = tenant, model, began
            self._sums.setdefault(kind, BilledSum(*kind)).add(bill)

    def sorted(self) -> list[BilledSum]:
        """The sums in the order of their groups."""
        return [self._sums[kind] for kind in sorted(self._sums)]


@asynccontextmanager
async def _opened(redis_url: str, key_file: Path) -> AsyncIterator[tuple[RedisCoordinator, Sealer]]:
    """The bills of a Redis, and what opens them."""
    clock = SharedClock()
    sealer = Sealer(_keyring(key_file), clock.now)
    try:
        connection = RedisConnection(redis_url, TIMEOUT_S, clock)
    except ValueError as error:
        raise BillsError(f"--redis-url / SAFELIGHT_REDIS_URL: {error}") from None
    coordinator = RedisCoordinator(connection, Breaker("redis", TIMEOUT_S))
    try:
        yield coordinator, sealer
    except StoreError as error:
        raise BillsError(f"--redis-url / SAFELIGHT_REDIS_URL: {error}") from None
    finally:
        await coordinator.close()
        await connection.close()


async def _read_redis(redis_url: str, key_file: Path, since_ms: int, until_ms: int | None, sums: Sums) -> None:
    async with _opened(redis_url, key_file) as (coordinator, sealer):
        async for bill in read_bills(coordinator, sealer, since_ms, until_ms):
            sums.add(bill)


def _read_table(
    name: str,
    sealer: Sealer | None,
    since_ms: int,
    until_ms: int | None,
    deployment: str | None,
    tenant: str | None,
    sums: Sums,
) -> list[Gap]:
    """Adds the bills of a table. Returns the times whose bills may be lost."""
    try:
        with closing(DynamoTable(name)) as table:
            ledger = Ledger(table, sealer, since_ms, until_ms, deployment, tenant)
            for bill in ledger.bills():
                sums.add(bill)
            return ledger.gaps()
    except TableError as error:
        raise BillsError(f"--table {name}: {error}") from None


async def _archive(redis_url: str, key_file: Path, name: str, deployment: str) -> ArchiveReport:
    try:
        with closing(DynamoTable(name)) as table:
            async with _opened(redis_url, key_file) as (coordinator, sealer):
                return await BillArchive(coordinator, table, deployment, sealer).run()
    except TableError as error:
        raise BillsError(f"--table / SAFELIGHT_BILLS_TABLE {name}: {error}") from None


def _keyring(key_file: Path) -> Keyring:
    try:
        return Keyring.load(key_file)
    except KeyringError as error:
        raise BillsError(f"--cache-key-file / SAFELIGHT_CACHE_KEY_FILE: {error}") from None


def _needed(value: Given | None, name: str) -> Given:
    if value is None:
        raise BillsError(f"{_option(name)} / SAFELIGHT_{name.upper()}: is needed to read the bills in Redis")
    return value


def _option(name: str) -> str:
    return f"--{name.removeprefix('as_').replace('_', '-')}"


def _gap_text(gap: Gap) -> str:
    times = (datetime.fromtimestamp(at_ms / 1000, UTC) for at_ms in (gap.begin_ms, gap.end_ms))
    begin, end = (f"{time:%Y-%m-%d %H:%M:%S}" for time in times)
    return (
        f"bills of {gap.deployment} from {begin} to {end} (UTC) may be missing: "
        "Redis had dropped or lost them before they were copied"
    )


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
