"""How often a call may be tried again, and for whom.

Only a failure of a batch of one member counts: of several nobody knows who
broke it, and the scheduler finds out by halves. A success forgets what was
counted, so that a long generation survives a runtime that stumbles now and
then. Pure; `engine.py` asks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from safelight_server.scheduler import Batch, Kind, Member

MAX_ATTEMPTS = 3
"""Failures in a row of a member alone after which it is given up."""


class Attempts:
    """Counts the failures of those that are in trouble."""

    def __init__(self) -> None:
        self._failures: defaultdict[Member, int] = defaultdict(int)

    def failed(self, batch: Batch, *, retryable: bool) -> Sequence[Member]:
        """A batch failed: its members that are not to be tried again.

        Args:
            retryable: false where a member that failed alone would fail again.
        """
        if batch.kind is Kind.PREVIEW or len(batch.members) > 1:
            return ()
        [member] = batch.members
        self._failures[member] += 1
        if retryable and self._failures[member] < MAX_ATTEMPTS:
            return ()
        del self._failures[member]
        return (member,)

    def succeeded(self, batch: Batch) -> None:
        """A batch came back."""
        if self._failures and batch.kind is not Kind.PREVIEW:
            for member in batch.members:
                self._failures.pop(member, None)

    def forget(self, member: Member) -> None:
        """It has ended."""
        self._failures.pop(member, None)
