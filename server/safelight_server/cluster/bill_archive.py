"""Copies bills from Redis' stream to the ledger (`ledger.py`), from the last one that was copied on.

Every write may be repeated: a run that was killed, a second one, and two at once leave the same items. The checkpoint
moves after the bills before it are written, and only from where this run found it. While the bill at the checkpoint is
still in the stream, so are all after it, as Redis drops the oldest first. If it is gone, bills may be lost: that is
written to the ledger as a gap, and the whole stream is copied.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from safelight_server.cluster.bills import LAST_OF_MS, Bill, open_bill
from safelight_server.cluster.ledger import (
    CHECKPOINT,
    PLACE,
    DirectoryEntry,
    Gap,
    bill_item,
    checkpoint_item,
    entry_of,
    gap_item,
)
from safelight_server.coordination.base import BEGINNING, Coordinator, StreamEvent, place_order
from safelight_server.storage.dynamodb import DynamoTable, Item
from safelight_server.storage.sealed import CorruptError, Sealer, UnreadableError, parse_header

PAGE = 1000
"""Bills that are read at once, after which the checkpoint moves."""
NO_KEY = "none"
"""In place of the id of a key: bytes that no server has written."""


@dataclass(slots=True)
class ArchiveReport:
    """What a run did.

    Attributes:
        copied: bills that were written to the table, or written again.
        sealed: how many of them could not be decrypted, by the id of the key that encrypted them.
        gaps: times whose bills may be lost.
    """

    copied: int = 0
    sealed: dict[str, int] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Page:
    """Bills after the place `after`; `lost` tells that the bill at that place is gone from the stream."""

    after: str
    bills: list[StreamEvent]
    lost: bool


class BillArchive:
    """Copies the bills of one Redis to a table.

    Args:
        deployment: name under which they are kept. Two deployments with one table must have different names.
        sealer: decrypts the bills. Its clock is that of Redis.
    """

    def __init__(self, coordinator: Coordinator, table: DynamoTable, deployment: str, sealer: Sealer) -> None:
        self._coordinator = coordinator
        self._table = table
        self._deployment = deployment
        self._sealer = sealer
        self._entries: set[DirectoryEntry] = set()
        self._checkpoint: str | None = None

    async def run(self) -> ArchiveReport:
        """Copies the bills after the checkpoint. Those that are written after this begins are left for the next run.

        Raises:
            StoreError: Redis does not answer.
            TableError: the table cannot be used. What was copied before stays.
        """
        await self._coordinator.check()  # sets the clock by Redis
        until_ms = int(self._sealer.now() * 1000)
        stored = await asyncio.to_thread(self._table.get, CHECKPOINT, self._deployment)
        self._checkpoint = None if stored is None else stored[PLACE]["S"]
        report = ArchiveReport()
        moving = True
        async for page in self._pages(self._checkpoint or BEGINNING, until_ms):
            await self._write(page, report)
            moving = moving and await self._moved(page.bills[-1].place if page.bills else BEGINNING)
        return report

    async def _pages(self, after: str, until_ms: int) -> AsyncIterator[_Page]:
        while True:
            lost = False
            if after == BEGINNING:
                bills = await self._coordinator.bills(BEGINNING, PAGE)
            else:
                # One read has the bill that was read last, if it is still there, and those after it.
                bills = await self._coordinator.bills(_before(after), PAGE)
                lost = not bills or bills[0].place != after
                bills = await self._coordinator.bills(BEGINNING, PAGE) if lost else bills[1:]
            if bills or lost:
                yield _Page(after, bills, lost)
            if not bills or place_order(bills[-1].place)[0] > until_ms:
                return
            after = bills[-1].place

    async def _write(self, page: _Page, report: ArchiveReport) -> None:
        if page.lost:
            begin_ms = place_order(page.after)[0]
            end_ms = place_order(page.bills[0].place)[0] if page.bills else int(self._sealer.now() * 1000)
            gap = Gap(self._deployment, begin_ms, max(begin_ms, end_ms))
            await self._put([gap_item(gap, page.after)])
            report.gaps.append(gap)
        entries: set[DirectoryEntry] = set()
        items = []
        for event in page.bills:
            bill: Bill | None = None
            try:
                bill, expires_at = open_bill(self._sealer, event.data)
                if expires_at <= self._sealer.now():
                    continue  # as in `read_bills`: nobody is shown it any more
            except (CorruptError, UnreadableError):
                header = parse_header(event.data)
                key_id = NO_KEY if header is None else header.key_id
                report.sealed[key_id] = report.sealed.get(key_id, 0) + 1
            entry = entry_of(self._deployment, event, bill)
            entries.add(entry)
            items.append(bill_item(entry, event, bill))
        await self._put(entry.item() for entry in entries - self._entries)
        self._entries |= entries
        await self._put(items)
        report.copied += len(items)

    async def _put(self, items: Iterable[Item]) -> None:
        await asyncio.to_thread(self._table.write, list(items))

    async def _moved(self, place: str) -> bool:
        """Moves the checkpoint. False if another run has moved it: that run has copied what is before."""
        item = checkpoint_item(self._deployment, place)
        moved = await asyncio.to_thread(self._table.replace, item, PLACE, self._checkpoint)
        self._checkpoint = place if moved else self._checkpoint
        return moved


def _before(place: str) -> str:
    """The place after which `place` is the first one."""
    milliseconds, number = place_order(place)
    return f"{milliseconds}-{number - 1}" if number else f"{milliseconds - 1}-{LAST_OF_MS}"
