"""When outputs expire: one deadline an output, which may move.

Holds exactly the outputs that have a deadline, sorted; nothing stale is left
behind, so it is as bounded as the outputs are.
"""

from __future__ import annotations

import bisect


class Deadlines:
    """Deadlines by output, on the caller's clock."""

    def __init__(self) -> None:
        self._of: dict[int, float] = {}
        self._sorted: list[tuple[float, int]] = []

    def set(self, output_id: int, deadline: float | None) -> None:
        """Gives an output a deadline in place of the one that it had; None: it has none."""
        if (old := self._of.pop(output_id, None)) is not None:
            del self._sorted[bisect.bisect_left(self._sorted, (old, output_id))]
        if deadline is not None:
            self._of[output_id] = deadline
            bisect.insort(self._sorted, (deadline, output_id))

    def next(self) -> float | None:
        """The earliest deadline, None where no output has one."""
        return self._sorted[0][0] if self._sorted else None

    def passed(self, now: float) -> list[int]:
        """Outputs whose deadline has come, the earliest first."""
        return [
            output_id for _, output_id in self._sorted[: bisect.bisect_right(self._sorted, now, key=lambda d: d[0])]
        ]
