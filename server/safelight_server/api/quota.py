"""How many streams a caller has open, whatever they watch. Pure.

A stream counts from its first byte to its end, and one that its client does
not read counts until the connection has gone: so a caller can hold neither
memory nor sockets beyond its bound. `service.py` asks; queues of work have
bounds of their own in `admission.py`. Invariant: callers without streams are
forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import QueueFullError

RETRY_S = 1.0
"""Nothing says when a client will close a stream; this keeps retries from being a load."""


class StreamQuota:
    """The open streams of all callers.

    Args:
        max_streams: of one caller at once.
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
            QueueFullError: the caller has as many as it may have.
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
