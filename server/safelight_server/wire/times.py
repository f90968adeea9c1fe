"""Times and durations as messages."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def duration(seconds: float) -> Duration:
    """Seconds as a Duration."""
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


def timestamp(at: datetime) -> Timestamp:
    """A time as a Timestamp."""
    result = Timestamp()
    result.FromDatetime(at)
    return result
