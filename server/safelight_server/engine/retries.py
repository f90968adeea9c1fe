"""Counts failed batches and decides which outputs and prompts are given up.

Only failures of batches with one member (an output or a prompt) count: in a larger
batch any member may be the cause, and the scheduler finds it by halving the batch. A
success resets the counts, so that a long generation survives occasional failures of
the runtime. The loss of an instance is rarely the fault of its batch, so it is counted
separately, with a higher limit. Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from safelight_server.runtime.base import FaultOrigin
from safelight_server.scheduler import Batch, Kind, Member

MAX_ATTEMPTS = 3
"""A member is given up after so many failures in a row in batches of its own."""
MAX_LOST = 16
"""A member is given up after so many instances in a row were lost while they ran it alone."""


class RetryCounter:
    """Failures in a row, by member."""

    def __init__(self) -> None:
        self._failures: defaultdict[Member, int] = defaultdict(int)
        self._lost: defaultdict[Member, int] = defaultdict(int)

    def failed(self, batch: Batch, fault: FaultOrigin, *, retryable: bool) -> Sequence[Member]:
        """Counts a failed batch.

        Args:
            retryable: whether another try of a member that failed alone could succeed.

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
        """Resets the counts of the members of a batch that succeeded."""
        if (self._failures or self._lost) and batch.kind is not Kind.PREVIEW:
            for member in batch.members:
                self.forget(member)

    def forget(self, member: Member) -> None:
        """Drops the counts of a member that has ended."""
        self._failures.pop(member, None)
        self._lost.pop(member, None)
