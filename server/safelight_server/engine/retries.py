"""How often a call may be tried again, and for whom.

Only a failure of a batch of one member counts: of several nobody knows who
broke it, and the scheduler finds out by halves. A success forgets what was
counted, so that a long generation survives a runtime that stumbles now and
then. A lost instance is not the doing of who was on it, unless it happens to
them again and again: it is counted apart and for long. Pure; `engine.py` asks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from safelight_server.runtime.base import FaultOrigin
from safelight_server.scheduler import Batch, Kind, Member

MAX_ATTEMPTS = 3
"""Failures in a row of a member alone after which it is given up."""
MAX_LOST = 16
"""Instances in a row that may be lost under a member alone."""


class RetryCounter:
    """Counts the failures of those that are in trouble."""

    def __init__(self) -> None:
        self._failures: defaultdict[Member, int] = defaultdict(int)
        self._lost: defaultdict[Member, int] = defaultdict(int)

    def failed(self, batch: Batch, fault: FaultOrigin, *, retryable: bool) -> Sequence[Member]:
        """A batch failed: its members that are not to be tried again.

        Args:
            retryable: false where a member that failed alone would fail again.
        """
        if batch.kind is Kind.PREVIEW or len(batch.members) > 1 or fault is FaultOrigin.NOBODY:
            return ()
        [member] = batch.members
        counts, limit = (self._failures, MAX_ATTEMPTS) if fault is FaultOrigin.ROWS else (self._lost, MAX_LOST)
        counts[member] += 1
        if retryable and counts[member] < limit:
            return ()
        self.forget(member)
        return (member,)

    def succeeded(self, batch: Batch) -> None:
        """A batch came back."""
        if (self._failures or self._lost) and batch.kind is not Kind.PREVIEW:
            for member in batch.members:
                self.forget(member)

    def forget(self, member: Member) -> None:
        """It has ended."""
        self._failures.pop(member, None)
        self._lost.pop(member, None)
