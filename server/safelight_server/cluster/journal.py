"""Writes a generation's state events and pictures where other replicas find them, before any stream sees them.

So a sequence number means the same event on all replicas. `journal_rules.py` decides
what is written, shown and dropped, and when; this module does the writing.
Invariants: events are written in order and without a gap; an owner that was replaced
writes and shows nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from safelight_server.cluster import journal_rules
from safelight_server.cluster.journal_rules import JournalLines
from safelight_server.cluster.records import JournalEntry, dump, event_record
from safelight_server.coordination.leadership import Leadership
from safelight_server.domain.errors import SafelightError
from safelight_server.domain.events import GenerationState, StateEvent
from safelight_server.domain.picture import EncodedPicture
from safelight_server.storage.base import StoreError
from safelight_server.storage.sealed import Sealer
from safelight_server.telemetry.background import log_failure

log = structlog.get_logger(__name__)

Write = Callable[[], Awaitable[bool]]
"""Writes something to Redis and returns whether it is there. Idempotent: it may be called again."""


@dataclass(slots=True)
class _JournalLine:
    write: Write
    show: Callable[[], None] | None


class Journal:
    """Writes the events of one generation for its owner; a `stream.log.DurableWriter`.

    Args:
        leader: the lease of the generation.
        put: stores a picture in a shared tier; returns whether it is there.
        standing: returns the generation's state and error at the time of an event.
        on_lost: called once, when another replica has taken the generation over.
        before: the writes that came before those of this journal, in order.
    """

    def __init__(
        self,
        leader: Leadership,
        sealer: Sealer,
        put: Callable[[int, EncodedPicture], Awaitable[bool]],
        standing: Callable[[], tuple[GenerationState, SafelightError | None]],
        on_lost: Callable[[], None],
        before: Sequence[Write] = (),
    ) -> None:
        self._leader = leader
        self._sealer = sealer
        self._put = put
        self._standing = standing
        self._on_lost = on_lost
        self._lines = JournalLines(_JournalLine(write, None) for write in before)
        self._task: asyncio.Task[None] | None = None
        self._lost_watch = asyncio.create_task(self._watch())
        self._lost_watch.add_done_callback(log_failure)
        self._settle: Callable[[], Awaitable[None]] | None = None
        leader.on_forgotten = self._write_again
        if leader.forgotten:  # Redis lost its data before there was a journal; earlier writes may be gone
            self._write_again()

    def event(self, event: StateEvent, sequence: int, data: bytes, show: Callable[[], None]) -> None:
        """Queues a state event; `show` is called when it is written."""
        now = datetime.fromtimestamp(self._sealer.now(), UTC)
        self.write(event_record(event, sequence, data, *self._standing(), now), show)

    def picture(self, output_index: int, picture: EncodedPicture, show: Callable[[], None]) -> None:
        """Queues a finished picture; `show` is called when it is stored."""
        self._take(functools.partial(self._store, output_index, picture), show)

    async def _store(self, output_index: int, picture: EncodedPicture) -> bool:
        # no fence keeps a replaced owner from storing a picture, but it must not show that picture
        return await self._put(output_index, picture) and (self.held or await self._leader.confirm())

    def write(self, written: JournalEntry, show: Callable[[], None] | None = None) -> None:
        """Queues any other entry for the other replicas. `show` is called when it is written."""
        data = dump(self._sealer, self._leader.lease.name, written)
        self._take(functools.partial(self._leader.publish, data), show)

    def rewrite(self, write: Write, began_s: float) -> None:
        """Queues the write of the record, which began at `began_s` on the monotonic clock and was not answered."""
        self._take(write, _nothing)
        self._show(self._lines.failed(began_s, time.monotonic(), held=self.held))

    def end(self, settle: Callable[[], Awaitable[None]]) -> None:
        """Runs `settle` and releases the lease once everything is written or was given up; does not wait for that."""
        self._settle = settle
        self._lines.end(time.monotonic())
        self._ensure_running()

    @property
    def held(self) -> bool:
        """Whether this replica certainly owns the generation now: only then may it decide the outcome."""
        return self._leader.held

    @property
    def lost(self) -> bool:
        """Whether another replica is known to have held the lease since. A decision made here after that is void."""
        return self._leader.lost.is_set()

    async def closed(self) -> None:
        """Waits until everything is written, and after `end` until the lease is released."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def abandon(self) -> None:
        """Drops what is not written and releases the lease."""
        await self.stop()
        await self._leader.close()

    async def stop(self) -> None:
        """Drops what is not written and keeps the lease."""
        self._lines.close()
        tasks = {task for task in (self._lost_watch, self._task) if task is not None}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def _take(self, write: Write, show: Callable[[], None] | None) -> None:
        if self.lost and not self._lines.open:
            self._lines.replaced()  # the lease was lost after the journal was settled
        line = _JournalLine(write, show)
        self._show(self._lines.take(line, time.monotonic(), held=self.held, replaceable=show is None))
        if self._lines.open:
            self._ensure_running()

    def _write_again(self) -> None:
        if self._lines.forgotten():
            log.warning("Redis has lost its memory; a generation is written again")
            self._ensure_running()

    def _ensure_running(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(log_failure)

    async def _run(self) -> None:
        while self._lines.open and (self._lines.first is not None or self._settle is not None):
            if (line := self._lines.first) is None:
                await self._close()
                return
            began = time.monotonic()
            if await self._try_write(line):
                self._show(self._lines.written(line))
                continue
            if self.lost:
                return  # the write was refused: another replica owns the generation and decides what is shown
            self._show(self._lines.failed(began, time.monotonic(), held=self.held))
            if self._lines.first is None:
                log.warning("what was not written of a generation in time is given up")
                continue
            await asyncio.sleep(journal_rules.RETRY_S)

    async def _close(self) -> None:
        settle, self._settle = self._settle, None
        assert settle is not None
        self._lines.close()
        self._lost_watch.cancel()
        with contextlib.suppress(StoreError):
            await settle()
        await self._leader.close()

    @staticmethod
    async def _try_write(line: _JournalLine) -> bool:
        try:
            return await line.write()
        except StoreError:
            return False
        except Exception:  # treated as an outage: later lines wait, are shown here, and are given up in the end
            log.exception("bug")
            return False

    async def _watch(self) -> None:
        await self._leader.lost.wait()
        self._lines.replaced()
        await self._leader.close()
        self._on_lost()

    @staticmethod
    def _show(lines: Sequence[_JournalLine]) -> None:
        for line in lines:
            if line.show is not None:
                show, line.show = line.show, None
                show()


def _nothing() -> None:
    """Shows a line that no stream sees."""
