"""The ledger: bills in a table of DynamoDB, for several deployments, kept after Redis has dropped them.

`bill_archive.py` writes it, `safelight bills --table` reads it. Tenant, model and work are in plain text there: the
table is encrypted at rest, and who may read it is decided by IAM. A bill that could not be decrypted stays sealed, as a
bill of no tenant, and is decrypted when somebody reads it with the right key. Nothing is read by a scan:

    partition                      sort key                            what
    bills#DEPLOYMENT#TENANT#MONTH  TIME#NUMBER#DIGEST                  a bill
    directory                      MONTH#DEPLOYMENT#TENANT             there are bills of a tenant in a month
    gaps                           DEPLOYMENT#PLACE                    a time whose bills may be lost
    checkpoint                     DEPLOYMENT                          the last bill that was copied

A bill's key follows from its place in Redis' stream and its bytes, so that it is the same item however often it is
copied. The entry of the directory is written before the bills: what is in the table is found.
See docs/decisions/0051-ledger.md.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

from safelight_server.cluster.bills import Bill, open_bill
from safelight_server.coordination.base import StreamEvent, place_order
from safelight_server.storage.dynamodb import PARTITION, SORT, DynamoTable, Item, TableError
from safelight_server.storage.sealed import CorruptError, Sealer, UnreadableError

DIRECTORY, GAPS, CHECKPOINT = "directory", "gaps", "checkpoint"
SEALED_TENANT = ""
"""In place of a tenant, in the keys of bills that could not be decrypted."""
MAX_SEALED_BYTES = 64 * 1024
"""Bytes of a sealed bill that are copied. Bills have some hundred; DynamoDB takes items of 400 KiB."""
PLACE = "place"
"""Attribute of the checkpoint: the place in Redis' stream."""
TWICE_MS = 3_600_000
"""How far apart Redis may have taken the same bill twice: as long as it recognises bills (`BILLED_S`)."""
FIRST, LAST = " ", "~"
"""Before the first and after the last of all sort keys."""
LATEST_MS = 253_402_300_799_999
"""The end of the year 9999."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A time whose bills may be lost, since Redis dropped them before they were copied. Times are Unix milliseconds."""

    deployment: str
    begin_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """Tells that there are bills of a tenant of a deployment in a month, such as "2026-01"."""

    month: str
    deployment: str
    tenant: str

    @property
    def partition(self) -> str:
        """The partition of these bills."""
        return f"bills#{self.deployment}#{self.tenant}#{self.month}"

    def item(self) -> Item:
        """The item of the directory."""
        return {PARTITION: {"S": DIRECTORY}, SORT: {"S": f"{self.month}#{self.deployment}#{self.tenant}"}}


def entry_of(deployment: str, event: StreamEvent, bill: Bill | None) -> DirectoryEntry:
    """The entry of the directory under which a bill is found; None: one that could not be decrypted."""
    tenant = SEALED_TENANT if bill is None else bill.tenant
    return DirectoryEntry(_time(place_order(event.place)[0])[:7], deployment, tenant)


def bill_item(entry: DirectoryEntry, event: StreamEvent, bill: Bill | None) -> Item:
    """The item of a bill; None: of one that could not be decrypted, whose bytes are copied."""
    at_ms, number = place_order(event.place)
    at = _time(at_ms)
    digest = hashlib.sha256(event.data).hexdigest()[:16]
    facts: dict[str, Mapping[str, object]]
    if bill is None:
        facts = {"sealed": {"B": event.data[:MAX_SEALED_BYTES]}}
    else:
        facts = {
            "tenant": {"S": bill.tenant},
            "generation": {"S": bill.generation},
            "model_revision": {"S": bill.model_revision},
            "disposition": {"S": bill.disposition},
            "rows": {"N": str(bill.rows)},
            "steps": {"N": str(bill.steps)},
            "compute_s": {"N": repr(bill.compute_s)},
        }
    keys = {PARTITION: {"S": entry.partition}, SORT: {"S": f"{at}#{number:020d}#{digest}"}}
    return keys | {"deployment": {"S": entry.deployment}, "committed_at": {"S": at}} | facts


def gap_item(gap: Gap, place: str) -> Item:
    """The item of a gap; `place` is the last place that was copied before it, so that it is noted once."""
    times = {"begin_ms": {"N": str(gap.begin_ms)}, "end_ms": {"N": str(gap.end_ms)}}
    return {PARTITION: {"S": GAPS}, SORT: {"S": f"{gap.deployment}#{place}"}} | times


def checkpoint_item(deployment: str, place: str) -> Item:
    """The item that says up to where the bills of a deployment are copied."""
    return {PARTITION: {"S": CHECKPOINT}, SORT: {"S": deployment}, PLACE: {"S": place}}


class Ledger:
    """Reads the bills of a time range, or of a tenant or a deployment in it.

    Args:
        sealer: decrypts bills that were copied sealed; None: they stay so.
        since_ms, until_ms: Unix milliseconds; the end is exclusive.
        deployment, tenant: None: all.
    """

    def __init__(
        self,
        table: DynamoTable,
        sealer: Sealer | None = None,
        since_ms: int = 0,
        until_ms: int | None = None,
        deployment: str | None = None,
        tenant: str | None = None,
    ) -> None:
        self._table = table
        self._sealer = sealer
        self._since_ms = since_ms
        self._until_ms = until_ms
        self._deployment = deployment
        self._tenant = tenant

    def bills(self) -> Iterator[Bill | None]:
        """Yields the bills by deployment, tenant and time; None for one that cannot be decrypted, of whichever tenant.

        Raises:
            TableError: the table cannot be read.
        """
        entries = sorted(self._directory(), key=lambda entry: (entry.deployment, entry.tenant, entry.month))
        for _, of_deployment in groupby(entries, key=lambda entry: entry.deployment):
            sealed: dict[str, Item] = {}
            for tenant, months in groupby(of_deployment, key=lambda entry: entry.tenant):
                items = (item for month in months for item in self._table.query(month.partition, *self._range()))
                if tenant == SEALED_TENANT:  # the first one, as it is empty
                    sealed = {item[SORT]["S"]: item for item in items}
                    continue
                lately = _Lately()
                for item in items:
                    sealed.pop(item[SORT]["S"], None)  # copied once more, with a key file that has its key
                    with _written_by_an_archive(item):
                        is_twice = lately.has(item[SORT]["S"])
                    if not is_twice:
                        yield _bill(item)
            for bill in map(self._unsealed, sealed.values()):
                if bill is None or self._tenant in (None, bill.tenant):
                    yield bill

    def gaps(self) -> list[Gap]:
        """Returns the gaps in the time range.

        Raises:
            TableError: the table cannot be read.
        """
        found = []
        for item in self._table.query(GAPS, FIRST, LAST):
            deployment = item[SORT]["S"].partition("#")[0]
            with _written_by_an_archive(item):
                gap = Gap(deployment, int(item["begin_ms"]["N"]), int(item["end_ms"]["N"]))
            begins_late = self._until_ms is not None and gap.begin_ms >= self._until_ms
            if self._deployment in (None, deployment) and gap.end_ms >= self._since_ms and not begins_late:
                found.append(gap)
        return found

    def _directory(self) -> Iterator[DirectoryEntry]:
        first = _time(self._since_ms)[:7]
        last = "" if self._until_ms is None else _time(self._until_ms - 1)[:7]
        for item in self._table.query(DIRECTORY, first, f"{last}{LAST}"):
            with _written_by_an_archive(item):
                month, of_deployment, tenant = item[SORT]["S"].split("#")
            entry = DirectoryEntry(month, of_deployment, tenant)
            if self._deployment in (None, entry.deployment) and (
                self._tenant is None or entry.tenant in (self._tenant, SEALED_TENANT)
            ):
                yield entry

    def _range(self) -> tuple[str, str]:
        """The first and the last sort key of a bill in the time range."""
        # "#" is before all digits and letters, so a key that is only a time is before those of the bills of that time.
        return _time(self._since_ms), LAST if self._until_ms is None else _time(self._until_ms)

    def _unsealed(self, item: Item) -> Bill | None:
        with _written_by_an_archive(item):
            data = bytes(item["sealed"]["B"])
        try:
            return None if self._sealer is None else open_bill(self._sealer, data)[0]
        except (CorruptError, UnreadableError):
            return None


@contextmanager
def _written_by_an_archive(item: Item) -> Iterator[None]:
    """Names the item if it has not what `bill_archive.py` writes."""
    try:
        yield
    except (KeyError, ValueError) as error:
        keys = f"{PARTITION} {item[PARTITION]['S']!r}, {SORT} {item[SORT]['S']!r}"
        raise TableError(f"{keys}: `safelight bills archive` has not written this item") from error


def _bill(item: Item) -> Bill:
    with _written_by_an_archive(item):
        return Bill(
            tenant=item["tenant"]["S"],
            generation=item["generation"]["S"],
            rows=int(item["rows"]["N"]),
            steps=int(item["steps"]["N"]),
            compute_s=float(item["compute_s"]["N"]),
            model_revision=item["model_revision"]["S"],
            disposition=item["disposition"]["S"],
        )


class _Lately:
    """Recognises a bill that Redis took twice: the first write was lost in a failover after it had been copied.

    Then two items have the same bytes, so the same digest, and times that differ by what the commit was repeated in.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[str, int] = OrderedDict()

    def has(self, sort_key: str) -> bool:
        """Whether a bill with these bytes was seen. Sort keys must come in their order."""
        at, _, digest = sort_key.split("#")
        at_ms = round(datetime.fromisoformat(at).timestamp() * 1000)
        while self._seen and next(iter(self._seen.values())) < at_ms - TWICE_MS:
            self._seen.popitem(last=False)
        if digest in self._seen:
            return True
        self._seen[digest] = at_ms
        return False


def _time(unix_ms: int) -> str:
    """UTC to the millisecond, such as "2026-01-31T23:59:59.999Z", which sorts as time does."""
    seconds, milliseconds = divmod(min(unix_ms, LATEST_MS), 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03d}Z"
