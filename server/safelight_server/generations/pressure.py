"""Which priority classes are under pressure: more is queued than is done in the time that they may wait. Pure.

Work is counted as the scaler counts it (`scaler.demand`): in seconds of one
instance in full batches, and for each class with all that comes before it. A
class is late when that takes longer than it may wait, and is so until it takes
less than half of that, so that what is decided by it does not change with
every request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from safelight_server.scheduler import Priority

BEGINS, ENDS = 1.0, 0.5
"""Queued work, by what is done in the time that a class may wait, above which it is late and below which it no longer
is."""


class Pressure:
    """What is late.

    Args:
        wait_s: how long work of a class may wait; a class without an entry is never late.
        changed: is told of a class that is late from now on, or no longer, with its queued work by what is done in
            its time.
    """

    def __init__(
        self,
        wait_s: Mapping[Priority, float],
        changed: Callable[[Priority, bool, float], None] = lambda _priority, _late, _load: None,
    ) -> None:
        self._wait_s = dict(wait_s)
        self._late = dict.fromkeys(self._wait_s, False)
        self._changed = changed

    def update(self, left_s: Mapping[Priority, float], num_instances: int) -> None:
        """Looks at the queue of this moment. While no instance is live nobody knows, and all stays as it is.

        Args:
            left_s: seconds of one instance that are left to do, by class.
            num_instances: that are live.
        """
        if not num_instances:
            return
        for priority, wait_s in self._wait_s.items():
            work_s = sum(seconds for other, seconds in left_s.items() if other <= priority)
            load = work_s / (num_instances * wait_s)
            late = load >= ENDS if self._late[priority] else load > BEGINS
            if late is not self._late[priority]:
                self._late[priority] = late
                self._changed(priority, late, load)

    def on(self, priority: Priority) -> bool:
        """Whether a class is under pressure: it is late, or one that comes before it is."""
        return any(late for other, late in self._late.items() if other <= priority)
