"""Bounds the number of open streams of each caller. Pure.

A stream counts until it has ended; a stream that its client does not read
counts until the connection is closed. So the memory and sockets that a caller
holds are bounded. The queues of work have bounds of their own, in
`generations/admission.py`. Invariant: callers without streams use no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import QueueFullError

RETRY_S = 1.0
"""RetryInfo of a refusal. Nobody knows when a stream will be closed; retries at this interval are no load."""


class StreamQuota:
    """Counts the open streams of each caller.

    Args:
        max_streams: how many streams a caller may have open at once.
    """

    def __init__(self, max_streams: int) -> None:
        self._max_streams = max_streams
        self._open: Counter[Caller] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    @contextmanager
    def stream(self, caller: Caller) -> Iterator[None]:
        """Counts a stream while the block runs.

        Raises:
            QueueFullError: the caller has `max_streams` open.
        """
        if self._open[caller] >= self._max_streams:
            subject, limit = f"caller {caller.tenant}/{caller.name}", str(self._max_streams)
            raise QueueFullError(
                f"{subject} has {limit} streams open, as many as it may have",
                reason="TOO_MANY_STREAMS",
                metadata={"bound": "streams", "subject": subject, "limit": limit},
                retry_after_s=RETRY_S,
            )
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]
