"""Deadlines of outputs, sorted, so that the earliest is found at once.

An output has at most one deadline, which can be changed. Old deadlines are
removed at once, so that there are never more entries than outputs.
"""

from __future__ import annotations

import bisect


class Deadlines:
    """Deadline of each output that has one, in seconds of the caller's clock."""

    def __init__(self) -> None:
        self._of: dict[int, float] = {}
        self._sorted: list[tuple[float, int]] = []

    def set(self, output_id: int, deadline: float | None) -> None:
        """Sets or replaces an output's deadline; None removes it."""
        if (old := self._of.pop(output_id, None)) is not None:
            del self._sorted[bisect.bisect_left(self._sorted, (old, output_id))]
        if deadline is not None:
            self._of[output_id] = deadline
            bisect.insort(self._sorted, (deadline, output_id))

    def get(self, output_id: int) -> float | None:
        """An output's deadline, or None if it has none."""
        return self._of.get(output_id)

    def next(self) -> float | None:
        """The earliest deadline, or None if no output has one."""
        return self._sorted[0][0] if self._sorted else None

    def passed(self, now: float) -> list[int]:
        """Outputs whose deadline has come, the earliest first."""
        return [
            output_id for _, output_id in self._sorted[: bisect.bisect_right(self._sorted, now, key=lambda d: d[0])]
        ]
