"""Times and durations of the domain as protobuf messages, and the reverse."""

from __future__ import annotations

import math
from datetime import datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def duration(num_seconds: float) -> Duration:
    """A number of seconds as a Duration, to the nanosecond."""
    result = Duration()
    result.FromNanoseconds(round(num_seconds * 1e9))
    return result


def seconds(message: Duration) -> float:
    """A Duration as a number of seconds; NaN if it breaks the rules of google.protobuf.Duration."""
    whole, nanos = message.seconds, message.nanos
    valid = abs(whole) <= 315_576_000_000 and abs(nanos) < 1_000_000_000 and whole * nanos >= 0
    return whole + nanos / 1e9 if valid else math.nan


def timestamp(at: datetime) -> Timestamp:
    """A point in time as a Timestamp."""
    result = Timestamp()
    result.FromDatetime(at)
    return result
