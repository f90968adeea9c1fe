"""Counts failed batches and says which outputs and prompts are given up.

Only a failure of a batch of one member (output or prompt) counts: of several
nobody knows which broke it, and the scheduler finds out by halving the batch. A
success resets the counts, so that a long generation survives a runtime that
fails now and then. The loss of an instance is rarely the fault of the batch that
it ran: it is counted apart, with a higher limit. Pure: no clock, no I/O.
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
    """Failures in a row, by member."""

    def __init__(self) -> None:
        self._failures: defaultdict[Member, int] = defaultdict(int)
        self._lost: defaultdict[Member, int] = defaultdict(int)

    def failed(self, batch: Batch, fault: FaultOrigin, *, retryable: bool) -> Sequence[Member]:
        """Counts a failed batch.

        Args:
            retryable: false where a member that failed alone would fail again.

        Returns:
            The members that are given up.
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
        """Resets the counts of the members of a batch that came back."""
        if (self._failures or self._lost) and batch.kind is not Kind.PREVIEW:
            for member in batch.members:
                self.forget(member)

    def forget(self, member: Member) -> None:
        """Drops the counts of a member that has ended."""
        self._failures.pop(member, None)
        self._lost.pop(member, None)
