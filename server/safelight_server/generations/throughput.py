"""How many outputs of a class end in a second while others of it wait: measured, for the times in RetryInfo. Pure.

The cost curves alone are optimistic: they leave out decoding, the time between calls, and
what other classes leave of their shares. So the ends of outputs are counted, in those times
in which outputs of the class wait, since otherwise the callers decide how many end. The
expectation from the cost curves counts as `PRIOR` outputs that were seen, and bounds the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from safelight_server.scheduler import Priority

PRIOR = 8
"""The expectation weighs as much as so many outputs that were seen to end."""
MEMORY = 64
"""Once more outputs were seen than this, all that was seen counts half: older ends weigh less and less."""
MAX_FACTOR = 4.0
"""A measurement is at most so many times the expectation, and at least that part of it."""


@dataclass(slots=True)
class _ClassEnds:
    """What was seen of a class.

    Attributes:
        num_outputs, seconds: outputs that ended while others waited, and in how much time.
        num_ended, at, had_waiting: of the last observation.
    """

    num_outputs: float = 0.0
    seconds: float = 0.0
    num_ended: int = 0
    at: float = 0.0
    had_waiting: bool = False


class Throughput:
    """Measures the throughput of each class."""

    def __init__(self) -> None:
        self._seen = {priority: _ClassEnds() for priority in Priority}

    def observe(self, priority: Priority, num_ended: int, has_waiting: bool, now: float) -> None:
        """Counts what has ended since the last observation, if outputs waited then and wait now.

        Args:
            num_ended: outputs of the class that have ended, in all.
            now: seconds, never less than before.
        """
        seen = self._seen[priority]
        if has_waiting and seen.had_waiting:
            seen.num_outputs += num_ended - seen.num_ended
            seen.seconds += now - seen.at
            if seen.num_outputs > MEMORY:
                seen.num_outputs /= 2
                seen.seconds /= 2
        seen.num_ended, seen.at, seen.had_waiting = num_ended, now, has_waiting

    def seconds_per_output(self, priority: Priority, expected_s: float) -> float:
        """Seconds in which one output of a class ends, while others wait.

        Args:
            expected_s: the same by the cost curves.
        """
        seen = self._seen[priority]
        measured_s = (seen.seconds + PRIOR * expected_s) / (seen.num_outputs + PRIOR)
        return min(max(measured_s, expected_s / MAX_FACTOR), expected_s * MAX_FACTOR)
