"""Decides which lines of a generation's journal are written, shown and dropped by its owner. Pure: no clock, no Redis.

A line is an event, a picture or a change of state. It is shown to this replica's streams once it is written. In an
outage of Redis it is shown at once and written later, but only by a replica that certainly still owns the generation.
`TRANSITIONS` is the complete table; `journal.py` does the writing.

Invariants: lines are written in their order; in state LOST only lines that had been written are shown.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Generic, TypeVar

RETRY_S = 0.5
"""Pause before a failed write is tried again. A try that ended less than twice this time ago is recent."""
GIVE_UP_S = 300.0
"""How long after its end a generation tries to write its last lines. A running generation never gives up."""

Line = TypeVar("Line")


class JournalState(Enum):
    """What a journal knows of Redis and of its lease."""

    WRITING = "lines are written"
    AWAY = "the last write failed"
    CLOSED = "settled or abandoned"
    LOST = "another replica owns it"


class JournalInput(Enum):
    """What happens to a journal. CERTAIN: the lease is certainly held, or the last try was short and is recent."""

    TAKEN = "a line comes"
    TAKEN_CERTAIN = "a line comes, certain"
    WRITTEN = "the first line is written"
    FAILED = "a write failed"
    FAILED_CERTAIN = "a write failed, certain"
    GIVEN_UP = "writes failed for too long after the end"
    FORGOTTEN = "Redis has lost its memory"
    REPLACED = "the lease is lost"
    CLOSING = "all is written and settled, or abandoned"


class JournalAction(Enum):
    """What the journal does about an input."""

    QUEUE = "write it later"
    QUEUE_AND_SHOW = "show it, write it later"
    SHOW = "show it"
    SHOW_FIRST = "show it, write the next one"
    SHOW_ALL = "show all that waits, try again"
    RETRY = "try again"
    DROP = "drop what waits"
    REWRITE = "write all lines again"
    NOTHING = "nothing"


_S, _I, _A = JournalState, JournalInput, JournalAction
TRANSITIONS: Mapping[tuple[JournalState, JournalInput], tuple[JournalState, JournalAction]] = {
    (_S.WRITING, _I.TAKEN): (_S.WRITING, _A.QUEUE),
    (_S.WRITING, _I.TAKEN_CERTAIN): (_S.WRITING, _A.QUEUE),
    (_S.WRITING, _I.WRITTEN): (_S.WRITING, _A.SHOW_FIRST),
    (_S.WRITING, _I.FAILED): (_S.AWAY, _A.RETRY),
    (_S.WRITING, _I.FAILED_CERTAIN): (_S.AWAY, _A.SHOW_ALL),
    (_S.WRITING, _I.FORGOTTEN): (_S.WRITING, _A.REWRITE),
    (_S.WRITING, _I.REPLACED): (_S.LOST, _A.DROP),
    (_S.WRITING, _I.CLOSING): (_S.CLOSED, _A.NOTHING),
    (_S.AWAY, _I.TAKEN): (_S.AWAY, _A.QUEUE),  # this process may have been frozen: Redis must confirm the lease first
    (_S.AWAY, _I.TAKEN_CERTAIN): (_S.AWAY, _A.QUEUE_AND_SHOW),
    (_S.AWAY, _I.WRITTEN): (_S.WRITING, _A.SHOW_FIRST),
    (_S.AWAY, _I.FAILED): (_S.AWAY, _A.RETRY),
    (_S.AWAY, _I.FAILED_CERTAIN): (_S.AWAY, _A.SHOW_ALL),
    (_S.AWAY, _I.GIVEN_UP): (_S.WRITING, _A.DROP),  # no line comes after it, so there is no gap
    (_S.AWAY, _I.FORGOTTEN): (_S.AWAY, _A.REWRITE),
    (_S.AWAY, _I.REPLACED): (_S.LOST, _A.DROP),  # the new owner decides, and may have decided otherwise
    (_S.AWAY, _I.CLOSING): (_S.CLOSED, _A.NOTHING),
    (_S.CLOSED, _I.TAKEN): (_S.CLOSED, _A.SHOW),
    (_S.CLOSED, _I.TAKEN_CERTAIN): (_S.CLOSED, _A.SHOW),
    (_S.CLOSED, _I.WRITTEN): (_S.CLOSED, _A.SHOW_FIRST),
    (_S.CLOSED, _I.FORGOTTEN): (_S.CLOSED, _A.NOTHING),
    (_S.CLOSED, _I.REPLACED): (_S.LOST, _A.DROP),
    (_S.CLOSED, _I.CLOSING): (_S.CLOSED, _A.NOTHING),
    (_S.LOST, _I.TAKEN): (_S.LOST, _A.NOTHING),
    (_S.LOST, _I.TAKEN_CERTAIN): (_S.LOST, _A.NOTHING),
    (_S.LOST, _I.WRITTEN): (_S.LOST, _A.SHOW_FIRST),  # written before the lease was lost: the new owner has read it
    (_S.LOST, _I.FORGOTTEN): (_S.LOST, _A.NOTHING),
    (_S.LOST, _I.REPLACED): (_S.LOST, _A.NOTHING),
    (_S.LOST, _I.CLOSING): (_S.LOST, _A.NOTHING),
}
"""The next state and the action, by state and input. A pair that is missing here is a bug of the caller."""


class JournalLines(Generic[Line]):
    """The lines of one journal: those that wait to be written, and those that are written.

    Methods return the lines to show now; the caller shows each line once.

    Args:
        before: lines that were written before this journal was made.
    """

    def __init__(self, before: Iterable[Line] = ()) -> None:
        self.state = JournalState.WRITING
        self._waiting: deque[Line] = deque()
        self._history = list(before)
        self._newest_state: Line | None = None
        self._away_since = 0.0
        self._tried_at = -math.inf
        self._ended_at = math.inf

    @property
    def open(self) -> bool:
        """Whether lines are still written."""
        return self.state in (JournalState.WRITING, JournalState.AWAY)

    @property
    def first(self) -> Line | None:
        """The line to write next; None: no line waits."""
        return self._waiting[0] if self._waiting else None

    @property
    def waiting(self) -> tuple[Line, ...]:
        """The lines that are still to be written, in order."""
        return tuple(self._waiting)

    def take(self, line: Line, now_s: float, *, held: bool, replaceable: bool) -> list[Line]:
        """Adds a line.

        Args:
            held: whether the lease is certainly held.
            replaceable: whether the line is a change of state. If Redis loses its data, only the newest of these is
                written again.
        """
        certain = held or now_s - self._tried_at < 2 * RETRY_S
        action = self._change(JournalInput.TAKEN_CERTAIN if certain else JournalInput.TAKEN)
        if action in (JournalAction.QUEUE, JournalAction.QUEUE_AND_SHOW):
            self._waiting.append(line)
            if replaceable:
                self._history = [earlier for earlier in self._history if earlier is not self._newest_state]
                self._newest_state = line
            self._history.append(line)
        return [line] if action in (JournalAction.SHOW, JournalAction.QUEUE_AND_SHOW) else []

    def written(self, line: Line) -> list[Line]:
        """Removes a line that is written. It is the first one, unless all lines were queued again meanwhile."""
        self._change(JournalInput.WRITTEN)
        if self._waiting and self._waiting[0] is line:
            self._waiting.popleft()
        return [line]

    def failed(self, began_s: float, now_s: float, *, held: bool) -> list[Line]:
        """Handles a failed write that began at `began_s`. The caller tries again after `RETRY_S` if `first` is set."""
        if self.state is JournalState.WRITING:
            self._away_since = now_s
        certain = held or now_s - began_s < 2 * RETRY_S  # during a longer call the process may have been frozen
        self._tried_at = now_s if certain else -math.inf
        action = self._change(JournalInput.FAILED_CERTAIN if certain else JournalInput.FAILED)
        shown = list(self._waiting) if action is JournalAction.SHOW_ALL else []
        if now_s - max(self._away_since, self._ended_at) > GIVE_UP_S:
            self._change(JournalInput.GIVEN_UP)
            self._waiting.clear()
        return shown

    def end(self, now_s: float) -> None:
        """Notes that the generation has ended, so that no more lines come."""
        self._ended_at = now_s

    def forgotten(self) -> bool:
        """Queues all lines again, since Redis has lost its data. Returns whether lines wait again."""
        if self._change(JournalInput.FORGOTTEN) is not JournalAction.REWRITE:
            return False
        self._waiting = deque(self._history)
        return True

    def replaced(self) -> None:
        """Drops the waiting lines, neither written nor shown, since another replica owns the generation."""
        self._change(JournalInput.REPLACED)
        self._waiting.clear()

    def close(self) -> None:
        """Ends the journal: nothing is written any more."""
        self._change(JournalInput.CLOSING)

    def _change(self, what: JournalInput) -> JournalAction:
        self.state, action = TRANSITIONS[self.state, what]
        return action
