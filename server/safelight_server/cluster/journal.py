"""Writes a generation's state events and pictures where other replicas find them, before any stream sees them.

So a sequence number means the same on all replicas. While Redis cannot be
reached, events are shown at once and written later. Where Redis has lost its
memory, all is written again. Invariants: what is written
is in order and has no gap; an owner that was replaced writes and shows nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from safelight_server.cluster.records import JournalEntry, dump, event_record
from safelight_server.coordination.leadership import Leadership
from safelight_server.domain.errors import SafelightError
from safelight_server.domain.events import GenerationState, StateEvent
from safelight_server.domain.picture import EncodedPicture
from safelight_server.storage.base import StoreError
from safelight_server.storage.sealed import Sealer
from safelight_server.telemetry.background import log_failure

log = structlog.get_logger(__name__)

RETRY_S = 0.5
GIVE_UP_S = 300.0
"""After the end; as long as it goes on a generation holds what it could not write."""


Write = Callable[[], Awaitable[bool]]
"""Writes something to Redis; whether it is there. May be called again: what is written twice counts once."""


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
        on_lost: called once when another replica has taken the generation over.
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
        self._lines: deque[_JournalLine] = deque()
        self._history = [_JournalLine(write, None) for write in before]
        self._state: _JournalLine | None = None
        self._task: asyncio.Task[None] | None = None
        self._watching = asyncio.create_task(self._watch())
        self._watching.add_done_callback(log_failure)
        self._settle: Callable[[], Awaitable[None]] | None = None
        self._ended_at = math.inf
        self._over = False
        self._away_since: float | None = None
        self._tried_at = -math.inf
        leader.on_forgotten = self._write_again
        if leader.forgotten:  # before there was a journal; what was written until then may be gone
            self._write_again()

    def event(self, event: StateEvent, sequence: int, data: bytes, show: Callable[[], None]) -> None:
        """Queues a state event; `show` is called when it is written."""
        now = datetime.fromtimestamp(self._sealer.now(), UTC)
        self.write(event_record(event, sequence, data, *self._standing(), now), show)

    def picture(self, output_index: int, picture: EncodedPicture, show: Callable[[], None]) -> None:
        """Queues a finished picture; `show` is called when it is stored."""
        self._take(functools.partial(self._store, output_index, picture), show)

    async def _store(self, output_index: int, picture: EncodedPicture) -> bool:
        # no fence keeps a replaced owner from storing a picture; it must not show the picture all the same
        return await self._put(output_index, picture) and (self.held or await self._leader.confirm())

    def write(self, written: JournalEntry, show: Callable[[], None] | None = None) -> None:
        """Queues any other entry that replicas need to know."""
        data = dump(self._sealer, self._leader.lease.name, written)
        self._take(functools.partial(self._leader.publish, data), show)

    def end(self, settle: Callable[[], Awaitable[None]]) -> None:
        """Runs `settle` and releases the lease once everything is written or was given up."""
        self._settle = settle
        self._ended_at = time.monotonic()
        self._go_on()

    @property
    def held(self) -> bool:
        """Whether this replica certainly owns the generation now: only then may it decide what becomes of it."""
        return self._leader.held

    @property
    def lost(self) -> bool:
        """Whether another replica is known to have held the lease since: what was decided here then is void."""
        return self._leader.lost.is_set()

    async def closed(self) -> None:
        """Waits until nothing is left to be written, and after `end` until the lease is released."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def abandon(self) -> None:
        """Drops what is not written and releases the lease."""
        self._over = True
        tasks = {task for task in (self._watching, self._task) if task is not None}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._leader.close()

    def _take(self, write: Write, show: Callable[[], None] | None) -> None:
        if self._over:
            if show is not None and not self._leader.lost.is_set():
                show()
            return
        line = _JournalLine(write, show)
        self._lines.append(line)
        if show is None:  # a change of state: only the newest counts
            self._history = [earlier for earlier in self._history if earlier is not self._state]
            self._state = line
        self._history.append(line)
        # away as of a moment ago: a process that has slept since must ask first, another may own the generation
        if self._away_since is not None and (self.held or time.monotonic() - self._tried_at < 2 * RETRY_S):
            self._show(line)
        self._go_on()

    def _write_again(self) -> None:
        if not self._over:
            log.warning("Redis has lost its memory; a generation is written again")
            self._lines = deque(self._history)
            self._go_on()

    def _go_on(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(log_failure)

    async def _run(self) -> None:
        while not self._over and (self._lines or self._settle is not None):
            if not self._lines:
                settle, self._settle = self._settle, None
                assert settle is not None
                self._over = True
                self._watching.cancel()
                with contextlib.suppress(StoreError):
                    await settle()
                await self._leader.close()
                return
            first = self._lines[0]
            began = time.monotonic()
            if await self._written(first):
                if self._lines and self._lines[0] is first:
                    self._lines.popleft()
                self._show(first)
                self._away_since = None
                continue
            if self._leader.lost.is_set():
                return  # it was refused, since another owns the generation: what is shown of it is that one's
            self._tried_at = time.monotonic()
            self._away_since = self._away_since or self._tried_at
            # a call that lasted so long may have slept with its process: asked again before anything is shown
            if self.held or self._tried_at - began < 2 * RETRY_S:
                for line in self._lines:
                    self._show(line)
            if time.monotonic() - max(self._away_since, self._ended_at) > GIVE_UP_S:  # nothing comes after: no gap
                log.warning("what was not written of a generation in time is given up")
                self._lines.clear()
                self._away_since = None
                continue
            await asyncio.sleep(RETRY_S)

    @staticmethod
    async def _written(line: _JournalLine) -> bool:
        try:
            return await line.write()
        except StoreError:
            return False
        except Exception:  # as in an outage: what follows is held up, shown here, and given up in the end
            log.exception("bug")
            return False

    async def _watch(self) -> None:
        await self._leader.lost.wait()
        self._over = True
        self._lines.clear()  # not shown: the new owner decides what becomes of it, and may have decided otherwise
        await self._leader.close()
        self._on_lost()

    @staticmethod
    def _show(line: _JournalLine) -> None:
        if line.show is not None:
            show, line.show = line.show, None
            show()
